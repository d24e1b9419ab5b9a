"""A checkpoint as a Hugging Face model folder that `from_pretrained` reads, on one CPU process.

python -m utils.export --checkpoint runs/demo/checkpoints/step-00000160 --output_dir model
"""

import copy
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers.initialization import guard_torch_init_functions

from utils.checkpoint import (
    earlier,
    parameter_names,
    read_constants,
    read_parameters,
    read_state,
    verify,
)
from utils.comparison import Reference, compare_tensors, read_reference
from utils.config import InputError, command, parse
from utils.files import written_aside
from utils.integrity import check_weights, locked, write_checksums
from utils.model_settings import (
    GENERATION,
    architecture_of,
    load_model,
    load_pretrained,
    quiet,
)

ADAPTER = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def base_model_of(checkpoint: Path) -> str | None:
    """Where the weights are that the checkpoint does not hold; raises InputError as read_state."""
    base = read_state(checkpoint).get("base_model")
    beside = os.path.abspath(checkpoint / (base or ""))
    return beside if base and base.startswith("..") and os.path.exists(beside) else base


@dataclass
class Arguments:
    """Export a checkpoint to Hugging Face format."""

    checkpoint: str  # a folder checkpoints/step-…
    output_dir: str  # written whole or not at all
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    average_last: int = 1  # the mean of so many checkpoints: this one, and those before it
    merge_adapter: bool = False  # of a run with LoRA: the whole model, the adapter in its weights
    trust_remote_code: bool = False  # run the Python that the checkpoint holds


def export(
    checkpoint: Path,
    output_dir: Path,
    dtype: torch.dtype = torch.float32,
    merge_adapter: bool = False,
    trust_remote_code: bool = False,
    average_last: int = 1,
) -> int:
    """Write weights, configuration and tokenizer; returns the number of parameters.

    Of a run with LoRA the adapter, as peft writes it, or the model that it has been merged into:
    in fp32, however its base was quantized or rounded in training. Before it is put in place it is
    read as its users will, and compared with what the run computed (utils/comparison.py).

    With `average_last` what was trained is the mean of as many checkpoints (Kaddour 2022, LAWA),
    and all else as this one has it.

    Raises:
        InputError: not a whole checkpoint, no base model, no space left, or it is not the same; or
            there are fewer to average, or of another model.
    """
    checkpoints = _with_those_before(checkpoint, average_last)
    base = base_model_of(checkpoint)
    has_adapter = (checkpoint / ADAPTER).exists()
    is_adapter = has_adapter and not merge_adapter
    # the run has not computed with a mean
    expected, rewritten = None if average_last > 1 else read_reference(checkpoint), []
    read = partial(load_pretrained, trust_remote_code=trust_remote_code)
    try:
        with by_itself(), locked(output_dir), written_aside(output_dir) as folder:
            folder.mkdir(parents=True)
            config = _unquantized(read(transformers.AutoConfig, checkpoint))
            if is_adapter:
                count = _write_adapter(checkpoints, config, base, folder, dtype)
            else:
                model = _whole_model(checkpoints, config, base, dtype)
                expected = expected or Reference.of(model)
                model = _merged(model).to(dtype)
                _keep_padding(model)
                if model.can_generate():
                    model.generation_config = transformers.GenerationConfig()  # see below
                model.save_pretrained(folder)
                held = model.named_parameters() if has_adapter else _held(checkpoints, model)
                rewritten = compare_tensors(output_dir, folder, held)
                count = sum(parameter.numel() for parameter in model.parameters())
                del model  # there may be no room for two
            if (checkpoint / GENERATION).exists():
                shutil.copy(checkpoint / GENERATION, folder)
            read(transformers.AutoTokenizer, checkpoint).save_pretrained(folder)
            if expected is not None:
                if not is_adapter:
                    config = _unquantized(read(transformers.AutoConfig, folder))
                tokenizer = read(transformers.AutoTokenizer, folder)
                expected.compare(output_dir, folder, config, tokenizer, dtype, rewritten)
            write_checksums(folder)
        return count
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {output_dir}: {error}") from None


@contextmanager
def by_itself() -> Iterator[None]:
    """Models are whole, as under ZeRO-3 they would not be, and transformers and peft are silent."""
    from transformers.integrations import deepspeed as integration  # which takes Accelerate

    zero3 = patch.object(integration, "_hf_deepspeed_config_weak_ref", None)
    with quiet(), zero3, warnings.catch_warnings(action="ignore"):
        yield


def _unquantized(config: Any) -> Any:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _whole_model(checkpoints: list[Path], config: Any, base: str | None, dtype: Any) -> Any:
    """The model as it was trained, an adapter beside its weights."""
    checkpoint = checkpoints[0]
    is_adapter = (checkpoint / ADAPTER).exists()
    dtype = torch.float32 if is_adapter else dtype  # an adapter is merged in full precision
    missing: set[str] = set()
    if base is None:
        model = architecture_of(config)._from_config(config, dtype=dtype)
    else:
        try:
            model, missing = load_model(architecture_of(config), base, config=config, dtype=dtype)
        except OSError as error:
            raise InputError(f"cannot load the base model {base}: {error}") from None
    if is_adapter:
        import peft

        model = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(checkpoint))
    tensors = _tensors(model)
    wanted = dict(model.named_parameters()).keys() if base is None else missing
    with torch.no_grad():
        for name, values in _held(checkpoints, model):
            tensors[name].copy_(values)
            wanted = wanted - {name}
    if wanted and not is_adapter:
        source = "" if base is None else f"nor its base model {base} "
        raise InputError(f"neither {checkpoint} {source}has {min(wanted)}")
    return model


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _held(checkpoints: list[Path], model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds of a model, one by one: what was trained is read as it comes, of
    several as their mean in float64, rounded once."""
    tensors, constants = _tensors(model), read_constants(checkpoints[0])
    yield from ((name, constants[name]) for name in constants.keys() & tensors.keys())
    trained = parameter_names(checkpoints[0]) & tensors.keys() - constants.keys()
    shapes = {name: tensors[name].shape for name in trained}
    readers = [read_parameters(checkpoint, shapes) for checkpoint in checkpoints]
    for found in zip(*readers, strict=True):
        name, values = found[0]
        if len(found) > 1:
            values = torch.stack([each.double() for _, each in found]).mean(0).float()
        yield name, values


def _with_those_before(checkpoint: Path, count: int) -> list[Path]:
    """The checkpoint and those before it, `count` in all, the newest first; raises InputError where
    there are fewer, one is not what was written, or one holds other tensors."""
    found = [checkpoint, *earlier(checkpoint)][: max(count, 1)]
    if len(found) != count:
        raise InputError(
            f"average_last: {count} of the {len(found)} checkpoints up to {checkpoint}: give 1 to "
            f"{len(found)}; keep_last and keep_every say how many a run keeps"
        )
    for other in found:
        verify(other)
        for names in (parameter_names, read_constants):
            if differ := {*names(checkpoint)} ^ {*names(other)}:
                raise InputError(
                    f"average_last: {checkpoint} and {other} are of different models: one of them "
                    f"does not hold {min(differ)}"
                )
    return found


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


def _keep_padding(model: Any) -> None:
    """Of a tied embedding the pad token's row is trained as the head's. Where transformers sets it
    to 0 whenever it reads it (Youtu), the configuration must name none."""
    embedding = model.get_input_embeddings()
    row = getattr(embedding, "padding_idx", None)
    if row is not None and embedding.weight[row].any():
        probe = torch.nn.Embedding.from_pretrained(torch.ones(2, 2), padding_idx=0)
        probe.weight._is_hf_initialized = True
        with guard_torch_init_functions():
            model._init_weights(probe)
        if not probe.weight.all():
            model.config.pad_token_id = None


def check_adapter(model: Any, merge: bool) -> None:
    """Before training: whether the adapter of a peft.PeftModel can leave, merged or alone.

    Raises:
        InputError: an embedding to merge it into does more than to look up, and peft adds to what
            comes out; or transformers changes a name when it reads the adapter again.
    """
    for name, layer in model.named_modules() if merge else ():
        is_lookup = getattr(type(layer), "forward", None) is torch.nn.Embedding.forward
        is_adapted = name.endswith(".base_layer") and isinstance(layer, torch.nn.Embedding)
        if is_adapted and not is_lookup and not hasattr(layer, "embed_scale"):
            name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            raise InputError(
                f"lora: {name} ({type(layer).__name__}) does more than to look up: an adapter is "
                "not merged into it. Name other target_modules, or set merge_adapter: false"
            )
    if merge:
        return
    adapter, config = copy.deepcopy(model.peft_config["default"]), copy.deepcopy(model.config)
    adapter.init_lora_weights = True  # other ways look at the weights of the base
    with by_itself(), torch.device("meta"):
        written = _as_written(_adapted(config, copy.deepcopy(adapter)))
        client = architecture_of(config)(config).to("meta")  # not all of XLNet is built there
        report = client.load_adapter(peft_config=adapter, adapter_state_dict=written)
    if lost := [*sorted(report.missing_keys), *sorted(report.unexpected_keys)]:
        raise InputError(
            f"lora: transformers would not read the adapter of {lost[0].partition('.lora_')[0]} "
            "again: it changes the name. Set merge_adapter: true, or name other target_modules"
        )


def _adapted(config: Any, adapter: Any) -> Any:
    """A peft.PeftModel without storage."""
    import peft

    with torch.device("meta"):
        return peft.get_peft_model(architecture_of(config)(config), adapter)


def _as_written(adapted: Any, tensors: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """The tensors of an adapter as its file names them."""
    import peft

    found = peft.get_peft_model_state_dict(adapted, state_dict=tensors)
    # DoRA's, which transformers overlooks without the ending, and peft reads with it, too
    ends = {name: ".weight" if name.endswith("lora_magnitude_vector") else "" for name in found}
    return {name + ends[name]: tensor.contiguous() for name, tensor in found.items()}


def _write_adapter(
    checkpoints: list[Path], config: Any, base: str, folder: Path, dtype: torch.dtype
) -> int:
    """The base model's weights are not read for it.

    A base that began in the run comes along: with a config.json beside the adapter transformers
    takes all there is from the one folder, wherever it is.
    """
    import peft

    checkpoint, adapter = checkpoints[0], peft.PeftConfig.from_pretrained(checkpoints[0])
    adapter.base_model_name_or_path = config.name_or_path = base  # peft would take the checkpoint
    adapted = _adapted(config, adapter)
    held = {n: t.to(dtype) if t.is_floating_point() else t for n, t in _held(checkpoints, adapted)}
    tensors = _as_written(adapted, held)
    if base != read_state(checkpoint)["base_model"]:  # it stands beside the checkpoint
        check_weights(base)
        shutil.copytree(base, folder, dirs_exist_ok=True)
        config.save_pretrained(folder)
    adapter.base_model_name_or_path = os.path.abspath(base) if os.path.exists(base) else base
    adapter.inference_mode = True
    save_file(tensors, folder / WEIGHTS)
    adapter.save_pretrained(folder)
    return sum(tensor.numel() for tensor in tensors.values())


def main() -> None:
    args = parse(Arguments)
    if Path(args.output_dir).exists():
        raise InputError(f"output_dir: {args.output_dir} exists")
    options = (getattr(torch, args.dtype), args.merge_adapter, args.trust_remote_code)
    source, output_dir = Path(args.checkpoint), Path(args.output_dir)
    count = export(source, output_dir, *options, args.average_last)
    mean = f", the mean of {args.average_last} checkpoints" if args.average_last > 1 else ""
    print(f"{args.output_dir}: {count:,} parameters in {args.dtype}{mean}")


if __name__ == "__main__":
    command(main)
