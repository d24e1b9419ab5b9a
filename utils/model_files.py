"""What stands in a checkpoint beside the weights, so that the export needs nothing else."""

import copy
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelFiles:
    """Configuration, tokenizer, and where there are such the settings of adapter and generation.

    Args:
        model: as it is before an engine takes hold of it; or a peft.PeftModel.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.others = [copy.deepcopy(model.config)]
        if hasattr(model, "get_base_model"):  # a peft.PeftModel, whose import takes seconds
            self.others.append(model.peft_config["default"])
        if model.can_generate():
            self.others.append(model.generation_config)

    def write(self, folder: Path) -> None:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)  # a slow one has none
        if backend is not None:
            backend.no_truncation()  # a call that truncates leaves that behind
            backend.no_padding()
        for part in (*self.others, self.tokenizer):
            part.save_pretrained(folder)
