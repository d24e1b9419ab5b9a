"""What the recipes share."""

import logging

# it speaks, when it is imported, of a kernel for 4-bit inference that training does not use
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
