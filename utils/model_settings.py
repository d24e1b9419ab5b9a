"""What the settings of a transformers config are called, and which of them cannot be."""

import copy
import inspect
import re
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers

from utils.config import InputError

# by what names configs call the same
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
HEADS = ("num_attention_heads", "num_key_value_heads")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", *HEADS)


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
