"""A checkpoint as a Hugging Face model folder that `from_pretrained` reads, on one CPU process.

python -m utils.export --checkpoint runs/demo/checkpoints/step-00000020 --output_dir model
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
from transformers.dynamic_module_utils import custom_object_save
from transformers.initialization import guard_torch_init_functions

from utils.checkpoint import parameter_names, read_constants, read_parameters, read_state, verify
from utils.comparison import Reference, compare_tensors, read_reference
from utils.config import InputError, command, parse
from utils.files import written_aside
from utils.integrity import check_weights, locked, write_checksums
from utils.model_settings import architecture_of, load_model, load_pretrained, quiet

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
        whole = model
        if hasattr(model, "get_base_model"):  # a peft.PeftModel, whose import takes seconds
            whole = model.get_base_model()
            self.others.append(copy.copy(model.peft_config["default"]))
            self.others[-1].base_model_name_or_path = self.base_model
        self.code = type(whole) if whole._auto_class else None  # that it brought with it
        if self.code:
            where = f"{self.code.__module__.rpartition('.')[2]}.{self.code.__name__}"
            known = getattr(self.others[0], "auto_map", None) or {}
            self.others[0].auto_map = known | {whole._auto_class: where}
        self.generation_config = model.generation_config if model.can_generate() else None

    def write(self, folder: Path) -> None:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)  # a slow one has none
        if backend is not None:
            backend.no_truncation()  # a call that truncates leaves that behind
            backend.no_padding()
        for part in (*self.others, self.tokenizer):
            part.save_pretrained(folder)
        if self.code:
            custom_object_save(self.code, folder)
        if self.generation_config is not None:
            # as it was given: save_pretrained refuses what published models have
            self.generation_config.to_json_file(folder / GENERATION)


def _from_checkpoint(model: str, run: Path) -> str | None:
    path, run = os.path.abspath(model), os.path.abspath(run)
    if not model or not os.path.exists(path):
        return model or None
    is_inside = os.path.commonpath([path, run]) == run
    return os.path.join("..", "..", os.path.relpath(path, run)) if is_inside else path


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
    merge_adapter: bool = False  # of a run with LoRA: the whole model, the adapter in its weights
    trust_remote_code: bool = False  # run the Python that the checkpoint holds


def export(
    checkpoint: Path,
    output_dir: Path,
    dtype: torch.dtype = torch.float32,
    merge_adapter: bool = False,
    trust_remote_code: bool = False,
) -> int:
    """Write weights, configuration and tokenizer; returns the number of parameters.

    Of a run with LoRA the adapter, as peft writes it, or the model that it has been merged into:
    in fp32, however its base was quantized or rounded in training. Before it is put in place it is
    read as its users will, and compared with what the run computed (utils/comparison.py).

    Raises:
        InputError: not a whole checkpoint, no base model, no space left, or it is not the same.
    """
    verify(checkpoint)
    base = base_model_of(checkpoint)
    has_adapter = (checkpoint / ADAPTER).exists()
    is_adapter = has_adapter and not merge_adapter
    expected, rewritten = read_reference(checkpoint), []
    read = partial(load_pretrained, trust_remote_code=trust_remote_code)
    try:
        with by_itself(), locked(output_dir), written_aside(output_dir) as folder:
            folder.mkdir(parents=True)
            config = _unquantized(read(transformers.AutoConfig, checkpoint))
            if is_adapter:
                count = _write_adapter(checkpoint, config, base, folder, dtype)
            else:
                model = _whole_model(checkpoint, config, base, dtype)
                expected = expected or Reference.of(model)
                model = _merged(model).to(dtype)
                _keep_padding(model)
                if model.can_generate():
                    model.generation_config = transformers.GenerationConfig()  # see below
                model.save_pretrained(folder)
                held = model.named_parameters() if has_adapter else _held(checkpoint, model)
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


def _whole_model(checkpoint: Path, config: Any, base: str | None, dtype: Any) -> Any:
    """The model as it was trained, an adapter beside its weights."""
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
        for name, values in _held(checkpoint, model):
            tensors[name].copy_(values)
            wanted = wanted - {name}
    if wanted and not is_adapter:
        source = "" if base is None else f"nor its base model {base} "
        raise InputError(f"neither {checkpoint} {source}has {min(wanted)}")
    return model


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _held(checkpoint: Path, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds of a model, one by one: what was trained is read as it comes."""
    tensors, constants = _tensors(model), read_constants(checkpoint)
    yield from ((name, constants[name]) for name in constants.keys() & tensors.keys())
    trained = parameter_names(checkpoint) & tensors.keys() - constants.keys()
    yield from read_parameters(checkpoint, {name: tensors[name].shape for name in trained})


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
    checkpoint: Path, config: Any, base: str, folder: Path, dtype: torch.dtype
) -> int:
    """The base model's weights are not read for it.

    A base that began in the run comes along: with a config.json beside the adapter transformers
    takes all there is from the one folder, wherever it is.
    """
    import peft

    adapter = peft.PeftConfig.from_pretrained(checkpoint)
    adapter.base_model_name_or_path = config.name_or_path = base  # peft would take the checkpoint
    adapted = _adapted(config, adapter)
    held = {n: t.to(dtype) if t.is_floating_point() else t for n, t in _held(checkpoint, adapted)}
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
    count = export(Path(args.checkpoint), Path(args.output_dir), *options)
    print(f"{args.output_dir}: {count:,} parameters in {args.dtype}")


if __name__ == "__main__":
    command(main)
