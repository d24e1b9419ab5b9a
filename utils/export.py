"""A checkpoint as a Hugging Face model folder that `from_pretrained` reads, on one CPU process.

python -m utils.export --checkpoint runs/demo/checkpoints/step-00000020 --output_dir model
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar

from utils.checkpoint import read_parameters, read_state
from utils.config import InputError, command, parse
from utils.run_folder import written_aside


@dataclass
class Arguments:
    """Export a checkpoint to Hugging Face format."""

    checkpoint: str  # a folder checkpoints/step-…
    output_dir: str  # written whole or not at all
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


def export(checkpoint: Path, output_dir: Path, dtype: torch.dtype = torch.float32) -> int:
    """Write weights, configuration and tokenizer; returns the number of parameters.

    Raises:
        InputError: not a whole checkpoint, or no space left.
    """
    read_state(checkpoint)
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    architecture = getattr(transformers, config.architectures[0])
    unset_hf_deepspeed_config()  # in a run under ZeRO-3 the model would be cut up as it is built
    model = architecture._from_config(config, dtype=dtype)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in read_parameters(
            checkpoint, {n: p.shape for n, p in parameters.items()}
        ):
            parameters[name].copy_(values)
    disable_progress_bar()
    try:
        with written_aside(output_dir) as folder:
            model.save_pretrained(folder)
            transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {output_dir}: {error}") from None
    return sum(p.numel() for p in parameters.values())


def main() -> None:
    args = parse(Arguments)
    if Path(args.output_dir).exists():
        raise InputError(f"output_dir: {args.output_dir} exists")
    count = export(Path(args.checkpoint), Path(args.output_dir), getattr(torch, args.dtype))
    print(f"{args.output_dir}: {count:,} parameters in {args.dtype}")


if __name__ == "__main__":
    command(main)
