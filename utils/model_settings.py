"""What is loaded by name, and with whose code; what the settings of a transformers config are
called, and which of them cannot be."""

import copy
import inspect
import re
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from utils.config import InputError

# by what names configs call the same
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
HEADS = ("num_attention_heads", "num_key_value_heads")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", *HEADS)


def load_pretrained(kind: Any, name: str, trust_remote_code: bool, **options: Any) -> Any:
    """`kind.from_pretrained`, which asks nobody, and runs no code unless it is trusted.

    Raises:
        InputError: it needs code of its own, or its weights are pickled.
    """
    if kind not in (transformers.AutoConfig, transformers.AutoTokenizer):
        names = getattr(options.get("config"), "architectures", None) or [kind.__name__]
        check_not_pickled(name, f"transformers.{names[0]}.from_pretrained({name!r})")
        options["use_safetensors"] = True
    try:
        found = kind.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
        needs_code = False
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        needs_code = True
    if kind is transformers.AutoTokenizer and not needs_code and not trust_remote_code:
        # beside a type of model that it knows, transformers takes another class in silence
        names_code = found.init_kwargs.pop("auto_map", None)
        own = names_code and get_tokenizer_config(name).get("tokenizer_class")
        needs_code = bool(own) and not hasattr(transformers, own)
    if needs_code:
        code = ", ".join(sorted(path.name for path in Path(name).glob("*.py"))) or "auto_map"
        raise InputError(
            f"{name} needs code of its own ({code}): it is run only with trust_remote_code: true"
        )
    if kind is transformers.AutoConfig and not trust_remote_code:
        vars(found).pop("auto_map", None)  # what is saved names no code that it did not run
    return found


def check_not_pickled(folder: str, loading: str) -> None:
    """Raises InputError for a folder with pickled weights alone; `loading`: Python that reads it."""
    for pickled, safe in (("pytorch_model*.bin", "model*"), ("adapter_model.bin", "adapter_model")):
        found = min(Path(folder).glob(pickled), default=None)
        if found and not any(Path(folder).glob(f"{safe}.safetensors")):
            raise InputError(
                f"{folder} has no weights but pickled ones ({found.name}), which may hold code: "
                f"where they are trusted, write safetensors: {loading}.save_pretrained({folder!r})"
            )


def class_of_its_own(config: Any, kind: str) -> Any:
    """The class, for one of transformers' auto classes, that came as trusted code; or None."""
    reference = (getattr(config, "auto_map", None) or {}).get(kind)
    if reference is None:
        return None
    found = get_class_from_dynamic_module(reference, config.name_or_path)
    found.register_for_auto_class(kind)  # save_pretrained takes the code along
    return found


def architecture_of(config: Any) -> Any:
    """The class of the model that was saved with this configuration."""
    name = config.architectures[0]
    for kind, reference in (getattr(config, "auto_map", None) or {}).items():
        if str(reference).endswith(f".{name}"):
            return class_of_its_own(config, kind)
    return getattr(transformers, name)


def max_positions(config: Any) -> tuple[int, str]:
    """(tokens that a row may have, the setting that says so); without one, more than there are."""
    settings = vars(config.get_text_config(decoder=True))
    limits = [(settings.get(name), name) for name in POSITIONS]
    return min(
        ((n, name) for n, name in limits if isinstance(n, int) and n > 0), default=(2**31, "")
    )


def settings_read(config_class: type) -> set[str]:
    """What a config or its models read beyond what it declares, and published configs have."""
    file = Path(inspect.getfile(config_class))
    files = (file, file.with_name(file.name.replace("configuration_", "modeling_")))
    source = "".join(path.read_text() for path in files if path.exists())
    read = re.findall(r"""config(?:\.|, ["'])([a-z]\w+)|kwargs\.(?:pop|get)\(["'](\w+)""", source)
    older = {"rope_theta", "rope_scaling"} if "rope_parameters" in source else set()
    return {name for names in read for name in names if name} | older | {"torch_dtype"}


def check_buildable(config: Any) -> None:
    """Raises InputError for settings of which no model can be made, or one that fails in use."""
    text = config.get_text_config(decoder=True)
    numbers = {k: v for k, v in vars(text).items() if type(v) is int}
    names = [text.attribute_map.get(name, name) for name in HEADS]
    heads, groups = (numbers.get(name, 1) for name in names)
    if heads % groups:
        raise InputError(f"model.{names[1]}: {groups} does not divide the {heads} heads")
    experts = next((name for name in EXPERTS if name in numbers), None)
    for name in {*CHOSEN_EXPERTS} & numbers.keys():
        if experts and numbers[name] > numbers[experts] > 0:
            raise InputError(
                f"model.{name}: {numbers[name]} is more than the {numbers[experts]} of {experts}"
            )
    base = transformers.AutoModel._model_mapping.get(type(config), None)
    base = base[0] if isinstance(base, tuple) else base
    try:
        with torch.device("meta"):
            _ = base and base(copy.deepcopy(config))
    except Exception as error:  # models meet a wrong setting in ways of their own
        problem = f"{type(error).__name__}: {shorten(str(error), 200)}"
        if isinstance(error, KeyError):  # an activation, mostly
            names = (name for name, value in vars(text).items() if error.args == (value,))
            problem = " or ".join(f"model.{name}: there is no {error}" for name in names) or problem
        raise InputError(f"model: no {config.model_type} can be built: {problem}") from None
