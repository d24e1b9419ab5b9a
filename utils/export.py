"""A checkpoint as a Hugging Face model folder that `from_pretrained` reads, on one CPU process.

python -m utils.export --checkpoint runs/demo/checkpoints/step-00000020 --output_dir model
"""

import copy
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.utils import logging

from utils.checkpoint import parameter_names, read_constants, read_parameters, read_state
from utils.comparison import Reference, read_reference
from utils.config import InputError, command, parse
from utils.files import written_aside

ADAPTER = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
GENERATION = "generation_config.json"


class ModelFiles:
    """Configuration, tokenizer, and where there are such the settings of adapter and generation.

    `base_model`: where the weights come from that a checkpoint does not hold, if there are any: a
    name of the Hub, an absolute path, or one relative to a checkpoint if it moves with the run.

    Args:
        model: as it is before an engine takes hold of it; or a peft.PeftModel.
        run: the folder of the run.
    """

    def __init__(
        self,
        model: "transformers.PreTrainedModel",
        tokenizer: transformers.PreTrainedTokenizerBase,
        run: Path,
    ):
        self.tokenizer = tokenizer
        is_whole = all(parameter.requires_grad for parameter in model.parameters())
        self.base_model = None if is_whole else _from_checkpoint(model.name_or_path, run)
        self.others = [copy.deepcopy(model.config)]
        if hasattr(model, "get_base_model"):  # a peft.PeftModel, whose import takes seconds
            self.others.append(copy.copy(model.peft_config["default"]))
            self.others[-1].base_model_name_or_path = self.base_model
        self.generation_config = model.generation_config if model.can_generate() else None

    def write(self, folder: Path) -> None:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)  # a slow one has none
        if backend is not None:
            backend.no_truncation()  # a call that truncates leaves that behind
            backend.no_padding()
        for part in (*self.others, self.tokenizer):
            part.save_pretrained(folder)
        if self.generation_config is not None:
            # as it was given: save_pretrained refuses what published models have
            self.generation_config.to_json_file(folder / GENERATION)


def _from_checkpoint(model: str, run: Path) -> str | None:
    path, run = os.path.abspath(model), os.path.abspath(run)
    if not model or not os.path.exists(path):
        return model or None
    is_inside = os.path.commonpath([path, run]) == run
    return os.path.join("..", "..", os.path.relpath(path, run)) if is_inside else path


def base_beside(checkpoint: Path) -> str | None:
    """The base model that moves with the run, if there is one."""
    base = read_state(checkpoint).get("base_model") or ""
    beside = os.path.normpath(checkpoint / base)
    return beside if base.startswith("..") and os.path.exists(beside) else None


def base_model_of(checkpoint: Path) -> str | None:
    """Where the weights are that the checkpoint does not hold; raises InputError as read_state."""
    return base_beside(checkpoint) or read_state(checkpoint).get("base_model")


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
    in fp32, however its base was quantized or rounded in training. Before it is put in place it is
    read as its users will, and compared with what the run computed (utils/comparison.py).

    Raises:
        InputError: not a whole checkpoint, no base model, no space left, or it is not the same.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # in a run under ZeRO-3 the model would be cut up as it is built
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base = base_model_of(checkpoint)
    is_adapter = (checkpoint / ADAPTER).exists() and not merge_adapter
    expected = read_reference(checkpoint)
    try:
        with written_aside(output_dir) as folder:
            folder.mkdir(parents=True)
            if is_adapter:
                count = _write_adapter(checkpoint, base, folder, dtype)
            else:
                model = _whole_model(checkpoint, base, dtype)
                expected = expected or Reference.of(model)
                model = _merged(model).to(dtype)
                if model.can_generate():
                    model.generation_config = transformers.GenerationConfig()  # see below
                model.save_pretrained(folder)
                count = sum(parameter.numel() for parameter in model.parameters())
                del model  # there may be no room for two
            if (checkpoint / GENERATION).exists():
                shutil.copy(checkpoint / GENERATION, folder)
            transformers.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
            if expected is not None:
                config = _config(checkpoint if is_adapter else folder)
                expected.compare(output_dir, folder, config, dtype)
        return count
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {output_dir}: {error}") from None
    finally:
        logging.set_verbosity(verbosity)


def _config(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _whole_model(checkpoint: Path, base: str | None, dtype: Any) -> Any:
    """The model as it was trained, an adapter beside its weights."""
    is_adapter = (checkpoint / ADAPTER).exists()
    dtype = torch.float32 if is_adapter else dtype  # an adapter is merged in full precision
    config = _config(checkpoint)
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
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    constants = {name: t for name, t in read_constants(checkpoint).items() if name in tensors}
    held = parameter_names(checkpoint) | constants.keys()
    wanted = dict(model.named_parameters()).keys() if base is None else missing
    if not is_adapter and wanted - held:
        source = "" if base is None else f"nor its base model {base} "
        raise InputError(f"neither {checkpoint} {source}has {min(wanted - held)}")
    shapes = {n: tensors[n].shape for n in tensors.keys() & held - constants.keys()}
    with torch.no_grad():
        for name, values in (*constants.items(), *read_parameters(checkpoint, shapes)):
            tensors[name].copy_(values)
    return model


def _merged(model: Any) -> Any:
    """The model with its adapter, if it has one, in its weights.

    What was tied and is not the same any more (the adapter of an embedding is not one of the
    head) leaves as two tensors.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                parameter = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
                setattr(module, name, parameter)
            seen.add(id(parameter))
    model = model.merge_and_unload()
    pairs = [map(model.get_parameter, pair) for pair in model.all_tied_weights_keys.items()]
    if all(torch.equal(*pair) for pair in pairs):
        model.tie_weights()
    elif not model.config.is_encoder_decoder:
        # else the setting stays: T5 and its kin scale the logits by it, and what is found twice and
        # differs is not tied by from_pretrained
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    return model


def export_needs_base(folder: Path) -> bool:
    """Whether there is an adapter alone in it."""
    return (folder / ADAPTER).exists() and not (folder / "config.json").exists()


def _write_adapter(checkpoint: Path, base: str, folder: Path, dtype: torch.dtype) -> int:
    """The base model's weights are not read for it.

    A base that began in the run comes along: with a config.json beside the adapter transformers
    takes all there is from the one folder, wherever it is.
    """
    import peft

    config = _config(checkpoint)
    adapter = peft.PeftConfig.from_pretrained(checkpoint)
    adapter.base_model_name_or_path = config.name_or_path = base  # peft would take the checkpoint
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
        adapted = peft.get_peft_model(model, adapter)
    held = parameter_names(checkpoint)
    shapes = {name: p.shape for name, p in adapted.named_parameters() if name in held}
    tensors = {name: t.to(dtype) for name, t in read_parameters(checkpoint, shapes)}
    tensors = peft.get_peft_model_state_dict(adapted, state_dict=tensors)
    if base == base_beside(checkpoint):
        shutil.copytree(base, folder, dirs_exist_ok=True)
        config.save_pretrained(folder)
    adapter.base_model_name_or_path = os.path.abspath(base) if os.path.exists(base) else base
    adapter.inference_mode = True
    # DoRA's, which transformers overlooks without the ending, and peft reads with it, too
    ends = {name: ".weight" if name.endswith("lora_magnitude_vector") else "" for name in tensors}
    tensors = {name + ends[name]: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS)
    adapter.save_pretrained(folder)
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
