"""A checkpoint as a Hugging Face model folder that `from_pretrained` reads, on one CPU process.

python -m utils.export --checkpoint runs/demo/checkpoints/step-00000020 --output_dir model
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import logging

from utils.checkpoint import parameter_names, read_parameters, read_state
from utils.config import InputError, command, parse
from utils.files import written_aside

WEIGHTS = "adapter_model.safetensors"


class ModelFiles:
    """Configuration, tokenizer, and where there are such the settings of adapter and generation.

    `base_model`: where the weights come from that a checkpoint does not hold, if there are any.

    Args:
        model: as it is before an engine takes hold of it; or a peft.PeftModel.
    """

    def __init__(
        self, model: "transformers.PreTrainedModel", tokenizer: transformers.PreTrainedTokenizerBase
    ):
        self.tokenizer = tokenizer
        is_whole = all(parameter.requires_grad for parameter in model.parameters())
        # saved buffers, too, are in no checkpoint (Marian's bias of the logits)
        buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
        self.base_model = None if is_whole and not buffers else model.name_or_path or None
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


@dataclass
class Arguments:
    """Export a checkpoint to Hugging Face format."""

    checkpoint: str  # a folder checkpoints/step-…
    output_dir: str  # written whole or not at all
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    merge_adapter: bool = False  # of a run with LoRA: the whole model, the adapter in its weights


def export(
    checkpoint: Path,
    output_dir: Path,
    dtype: torch.dtype = torch.float32,
    merge_adapter: bool = False,
) -> int:
    """Write weights, configuration and tokenizer; returns the number of parameters.

    Of a run with LoRA the adapter, as peft writes it, or the model that it has been merged into:
    in fp32, however its base was quantized or rounded in training.

    Raises:
        InputError: not a whole checkpoint, no base model, or no space left.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # in a run under ZeRO-3 the model would be cut up as it is built
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base = read_state(checkpoint).get("base_model")
    try:
        is_adapter = (checkpoint / "adapter_config.json").exists()
        if is_adapter and not merge_adapter:
            return _export_adapter(checkpoint, output_dir, dtype)
        model = _whole_model(checkpoint, base, is_adapter, dtype).to(dtype)
        if (checkpoint / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint)
        with written_aside(output_dir) as folder:
            model.save_pretrained(folder)
            transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
        return sum(parameter.numel() for parameter in model.parameters())
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {output_dir}: {error}") from None
    finally:
        logging.set_verbosity(verbosity)


def _whole_model(checkpoint: Path, base: str | None, is_adapter: bool, dtype: Any) -> Any:
    dtype = torch.float32 if is_adapter else dtype  # an adapter is merged in full precision
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    architecture = getattr(transformers, config.architectures[0])
    missing: set[str] = set()
    if base is None:
        model = architecture._from_config(config, dtype=dtype)
    else:
        try:
            model, loading = architecture.from_pretrained(
                base,
                config=config,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except OSError as error:
            raise InputError(f"cannot load the base model {base}: {error}") from None
        missing = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    if is_adapter:
        import peft

        model = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(checkpoint))
    parameters = dict(model.named_parameters())
    held = parameter_names(checkpoint)
    wanted = parameters.keys() if base is None else parameters.keys() & held
    if not is_adapter and missing - held:
        raise InputError(f"neither {checkpoint} nor its base model {base} has {min(missing)}")
    with torch.no_grad():
        for name, values in read_parameters(checkpoint, {n: parameters[n].shape for n in wanted}):
            parameters[name].copy_(values)
    return model.merge_and_unload() if is_adapter else model


def _export_adapter(checkpoint: Path, output_dir: Path, dtype: torch.dtype) -> int:
    """The base model's weights are not read for it."""
    import peft

    config = transformers.AutoConfig.from_pretrained(checkpoint)
    adapter = peft.PeftConfig.from_pretrained(checkpoint)
    config.name_or_path = adapter.base_model_name_or_path  # else peft puts the checkpoint there
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
        adapted = peft.get_peft_model(model, adapter)
    held = parameter_names(checkpoint)
    shapes = {name: p.shape for name, p in adapted.named_parameters() if name in held}
    tensors = {name: t.to(dtype) for name, t in read_parameters(checkpoint, shapes)}
    tensors = peft.get_peft_model_state_dict(adapted, state_dict=tensors)
    adapter.inference_mode = True
    with written_aside(output_dir) as folder:
        folder.mkdir(parents=True)
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
        adapter.save_pretrained(folder)
        if (checkpoint / "generation_config.json").exists():
            transformers.GenerationConfig.from_pretrained(checkpoint).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return sum(tensor.numel() for tensor in tensors.values())


def main() -> None:
    args = parse(Arguments)
    if Path(args.output_dir).exists():
        raise InputError(f"output_dir: {args.output_dir} exists")
    dtype = getattr(torch, args.dtype)
    count = export(Path(args.checkpoint), Path(args.output_dir), dtype, args.merge_adapter)
    print(f"{args.output_dir}: {count:,} parameters in {args.dtype}")


if __name__ == "__main__":
    command(main)
