"""What is trained of a model: all of it, a part, a low-rank adapter beside it (LoRA), or a smaller
model that is made of its layers."""

import copy
import dataclasses
import filecmp
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers

from utils.comparison import PRECISIONS
from utils.config import InputError
from utils.export import check_adapter
from utils.files import written_aside
from utils.integrity import check_weights, write_checksums
from utils.model import (
    ModelArguments,
    build_model,
    empty_model,
    initialize_weights,
    train_shared_padding,
)
from utils.model_settings import check_not_pickled
from utils.program import looked_for
from utils.randomness import random_key

if TYPE_CHECKING:
    import peft  # takes seconds, and is needed with an adapter alone


@dataclass
class AdapterArguments(ModelArguments):
    """The model, and what is trained of it."""

    # nothing, or what keeps its weights: the embeddings; they and the first N layers; the encoder
    freeze: Literal["embeddings", "encoder"] | int | None = None
    # as peft.LoraConfig takes it, for example {r: 16, lora_alpha: 32, use_dora: true}; null: none
    lora: dict[str, Any] | None = None
    loraplus_lr_ratio: float | None = None  # LoRA+: how much faster the B matrices learn
    adapter_name_or_path: str | None = None  # an adapter of this model to go on from
    merge_adapter: bool = False  # export the model with the adapter in its weights, not the adapter

    def check(self) -> None:
        if self.lora is not None:
            import peft  # its settings' names cost what importing it does

            known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
            if unknown := self.lora.keys() - known:
                (near,) = get_close_matches(min(unknown), known, 1, 0)
                raise InputError(
                    f"lora: LoraConfig has no setting {min(unknown)!r}: "
                    f"the nearest valid one is {near!r}"
                )
        if self.lora is not None and self.adapter_name_or_path is not None:
            raise InputError("lora: adapter_name_or_path brings its own settings: give one of them")
        if self.freeze is not None and self.has_adapter:
            raise InputError("freeze: LoRA trains its adapter alone: give one of freeze and lora")
        if self.adapter_name_or_path is not None and self.model_name_or_path is None:
            raise InputError("adapter_name_or_path: give model_name_or_path, that of its base")
        for name in ("loraplus_lr_ratio", "merge_adapter"):
            is_default = getattr(self, name) == getattr(type(self), name)  # a recipe may want it
            if not self.has_adapter and getattr(self, name) and not is_default:
                raise InputError(f"{name}: there is no adapter: give lora too")
        base, is_alone = self.model_name_or_path or "", self.has_adapter and not self.merge_adapter
        if is_alone and getattr(self, "push_to_hub", False) and os.path.exists(base):
            raise InputError(
                f"push_to_hub: the adapter's base {base} is a folder here, which others do not "
                "have: give its name on the Hub, or set merge_adapter: true"
            )
        super().check()

    def fixed(self) -> dict[str, Any]:
        names = (
            "model_name_or_path",
            "freeze",
            "lora",
            "adapter_name_or_path",
            "loraplus_lr_ratio",
        )
        return super().fixed() | {name: getattr(self, name) for name in names}

    @property
    def has_adapter(self) -> bool:
        return self.lora is not None or self.adapter_name_or_path is not None


def task_model(
    arguments: Any, config: Any, auto_model: Any, task_type: str, folder: Path, **options: Any
) -> "tuple[transformers.PreTrainedModel, transformers.PreTrainedModel | peft.PeftModel]":
    """(the model, what is trained of it: itself, or it with an adapter); all ranks call it.

    What begins from scratch and is not trained as a whole is written to `folder`/base_model, which
    the adapter refers to and a resume reads.

    Args:
        arguments: `TrainingArguments` and `AdapterArguments`.
        task_type: one of peft.TaskType.
        options: of `from_pretrained`.

    Raises:
        InputError: as `build_model`, `freeze`, `add_adapter` and `check_adapter` do.
    """
    from accelerate.state import AcceleratorState

    a = arguments
    if not a.model_name_or_path and (a.has_adapter or a.freeze is not None):
        base = folder / "base_model"
        with AcceleratorState().main_process_first():
            if not base.exists():
                _write_base(a, config, auto_model, base)
        a = replace(a, model_name_or_path=str(base))
    model = build_model(a, config, auto_model, dtype=base_dtype(a), **options)
    freeze(model, a.freeze)
    if not a.has_adapter:
        return model, model
    adapted = add_adapter(model, a, task_type, a.seed)
    check_adapter(adapted, a.merge_adapter)
    return model, adapted


def _write_base(arguments: Any, config: Any, auto_model: Any, path: Path) -> None:
    model = empty_model(copy.deepcopy(config), auto_model, "cpu")
    train_shared_padding(model)
    initialize_weights(model, arguments.seed, settings=arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        model.save_pretrained(aside)
        write_checksums(aside)


def base_dtype(arguments: Any) -> torch.dtype:
    """What is not trained needs no more than the precision that it computes in."""
    return PRECISIONS[arguments.mixed_precision] if arguments.has_adapter else torch.float32


def freeze(model: "transformers.PreTrainedModel", what: str | int | None) -> None:
    """Take parameters out of training.

    Args:
        what: "embeddings"; a number of layers, counted from the embeddings, which are frozen along
            with them; "encoder": everything but the head, or of an encoder-decoder its encoder.

    Raises:
        InputError: the model has no such layers, or nothing would be left to train.
    """
    if what is None:
        return
    base = model.base_model
    if what == "encoder":
        frozen = [model.get_encoder() if model.config.is_encoder_decoder else base]
    else:
        frozen = [module for module in base.modules() if isinstance(module, torch.nn.Embedding)]
        frozen += [getattr(base, "embeddings", None)]
        if isinstance(what, int):
            _, layers = layer_list(model)
            if what > len(layers):
                raise InputError(f"freeze: there are {len(layers)} layers, not {what}")
            frozen += layers[:what]
    for module in frozen:
        for parameter in module.parameters() if module is not None else ():
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"freeze: {what} leaves nothing to train")


def layer_list(model: "transformers.PreTrainedModel") -> tuple[str, torch.nn.ModuleList]:
    """(the name of the list of a model's layers, the list)"""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return name, module
    raise InputError(f"model: {model.config.model_type} has no list of {count} layers")


def carved(
    teacher: "transformers.PreTrainedModel",
    student: "transformers.PreTrainedModel",
    layers: Sequence[int] | None,
) -> "transformers.PreTrainedModel":
    """The student with the weights of the teacher: of these layers; null: of all.

    Where its MLPs are narrower, it gets the neurons whose weights are the largest: by the product
    of the norms of what leads into a neuron and out of it.
    """
    name, blocks = layer_list(teacher)
    layers = range(len(blocks)) if layers is None else layers
    inside = re.compile(rf"({re.escape(name)}\.)(\d+)(\..+)")
    given, sources, narrowed = teacher.state_dict(), {}, {}
    for key, tensor in student.state_dict().items():
        found = inside.fullmatch(key)
        source = key if found is None else f"{found[1]}{layers[int(found[2])]}{found[3]}"
        sources[key] = given[source]
        if tensor.shape != given[source].shape:
            narrowed.setdefault(found and found[2], {})[key] = tensor.shape
    for shapes in narrowed.values():
        dims = {
            key: next(d for d, n in enumerate(shape) if n != sources[key].shape[d])
            for key, shape in shapes.items()
        }
        sizes = {(sources[key].shape[dim], shapes[key][dim]) for key, dim in dims.items()}
        if len(sizes) > 1:
            raise InputError(
                f"student_intermediate_size: the MLP of {teacher.config.model_type} has more than "
                "one part in a matrix: give student_layers alone"
            )
        ((_, size),) = sizes
        matrices = [(sources[k].float(), dim) for k, dim in dims.items() if sources[k].dim() == 2]
        importance = torch.stack([x.norm(dim=1 - dim).log() for x, dim in matrices]).sum(0)
        kept = importance.topk(size).indices.sort().values
        for key, dim in dims.items():
            sources[key] = sources[key].index_select(dim, kept)
    student.load_state_dict(sources)
    return student


BASE = "model.safetensors"
# which peft trains and saves beside an adapter, wherever a model has them
HEADS = {"SEQ_CLS": ("classifier", "score")}


def add_adapter(
    model: "transformers.PreTrainedModel", arguments: AdapterArguments, task_type: str, seed: int
) -> "peft.PeftModel":
    """The model with a LoRA adapter, which alone is trained (with the head of a classifier).

    The base model is changed in place: it computes with the adapter from here on.

    Args:
        task_type: one of peft.TaskType.

    Raises:
        InputError: targets that match nothing, a setting of a wrong kind, another base's adapter.
    """
    import peft
    from peft.tuners.lora import LoraLayer

    if arguments.adapter_name_or_path is not None:
        return _load_adapter(model, arguments.adapter_name_or_path)
    given = copy.deepcopy(arguments.lora)  # peft extends its lists
    settings = {"target_modules": "all-linear", **given, "task_type": task_type}
    if task_type == "QUESTION_ANS":  # whose head peft does not know by all its names
        heads = [name for name, child in model.named_children() if child is not model.base_model]
        settings = {"modules_to_save": heads, "exclude_modules": heads} | settings
    # peft saves these heads by itself; a module inside of a saved one must not be named again
    saved = {*(settings.get("modules_to_save") or ()), *HEADS.get(task_type, ())}
    # what the base's weights do not hold would be frozen as it is drawn, and be in no file
    new = {name.rpartition(".")[0] for name in getattr(model, "newly_initialized", ())}
    new = {name for name in new if not saved & {*name.split(".")}}
    if new:
        settings["modules_to_save"] = sorted({*new, *(settings.get("modules_to_save") or ())})
    kind = settings.get("init_lora_weights", True)
    if isinstance(kind, str) and kind.startswith("pissa_niter"):
        raise InputError(
            f"lora.init_lora_weights: {kind} draws another base each time it is loaded: take pissa"
        )
    torch.manual_seed(random_key(seed, "lora"))  # ways to draw an adapter that are not named below
    try:
        config = peft.LoraConfig(**settings)
        # of names that transformers has changed
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            adapted = peft.get_peft_model(model, config)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise InputError(f"lora: {shorten(str(error), 300)}") from None
    if config.init_lora_weights is True:
        for name, module in adapted.named_modules():
            if isinstance(module, LoraLayer):
                torch.manual_seed(random_key(seed, name))
                module.reset_lora_parameters("default", True)
    for parameter in adapted.parameters():
        # a head that is copied from a base in 16 bits; ZeRO-3 keeps 32 bits of its own
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.float()
    return adapted


def _load_adapter(model: "transformers.PreTrainedModel", path: str) -> "peft.PeftModel":
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(path)
    except (ValueError, OSError) as error:
        problem = shorten(str(error), 200) + looked_for(path)
        raise InputError(f"adapter_name_or_path: cannot load {path}: {problem}") from None
    base, given = config.base_model_name_or_path, model.name_or_path
    check_not_pickled(path, f"peft.PeftModel.from_pretrained(base, {path!r})")
    check_weights(path)
    beside, files = Path(path) / BASE, [Path(str(b)) / BASE for b in (base, given)]
    is_base = files[0].resolve() == files[1].resolve()  # there are two ways to write one folder
    if beside.exists() and files[1].exists():  # of a run from scratch, which may have moved
        is_base = filecmp.cmp(beside, files[1], shallow=False)
    if not is_base:
        raise InputError(
            f"adapter_name_or_path: {path} is an adapter for {base}, not for {given}: "
            f"set model_name_or_path: {base}"
        )
    try:
        return peft.PeftModel.from_pretrained(model, path, is_trainable=True)
    except (RuntimeError, ValueError, KeyError) as error:
        problem = shorten(str(error), 200)
        raise InputError(f"adapter_name_or_path: {path} does not fit {given}: {problem}") from None


def trainable_share(model: "transformers.PreTrainedModel | peft.PeftModel") -> str:
    """Such as "12,288 of 1,000,000 parameters (1.23%)"."""
    import peft

    trained, total = peft.PeftModel.get_nb_trainable_parameters(model)
    return f"{trained:,} of {total:,} parameters ({trained / total:.2%})"
