"""Tokenizer, configuration and model of a run: from scratch, or on from given weights."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from utils.config import InputError
from utils.engine import initialize_weights

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")


@dataclass
class ModelArguments:
    """What is trained."""

    tokenizer: str | None = None  # a folder or Hub name; null: that of model_name_or_path
    model_name_or_path: str | None = None  # continue from these weights; null: from scratch
    # From scratch: the architecture, as transformers' config classes name its settings. The
    # vocabulary and the special tokens come from the tokenizer unless they are given.
    model: dict[str, Any] = field(default_factory=lambda: {"model_type": "llama"})
    attn_implementation: str | None = None  # sdpa, eager, flex_attention or flash_attention_2

    def check_model(self) -> None:
        if self.tokenizer is None and self.model_name_or_path is None:
            raise InputError("tokenizer: give a folder or Hub name")


def load_tokenizer(arguments: ModelArguments) -> Any:
    name = arguments.tokenizer or arguments.model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer: cannot load {name}: {shorten(str(error), 300)}") from None


def model_config(arguments: ModelArguments, sequence_length: int, tokenizer: Any = None) -> Any:
    """The configuration of the model, checked against the tokenizer and the sequence length.

    Args:
        tokenizer: where it is not given, it is loaded if the settings leave something to it.
    """
    settings, given = dict(arguments.model), arguments.model_name_or_path
    if tokenizer is None and (given or "vocab_size" not in settings):
        tokenizer = load_tokenizer(arguments)
    try:
        if given:
            config = AutoConfig.from_pretrained(given)
        else:
            if "model_type" not in settings:
                raise InputError("model: model_type is missing: llama, bert or another")
            defaults = type(AutoConfig.for_model(settings["model_type"]))()
            known = defaults.to_dict().keys() | defaults.attribute_map.keys()
            if unknown := settings.keys() - known:
                (near,) = get_close_matches(min(unknown), known, 1, 0)
                raise InputError(
                    f"model: {defaults.model_type} has no setting {min(unknown)!r}: "
                    f"the nearest valid one is {near!r}"
                )
            if tokenizer is not None:
                special = {k: getattr(tokenizer, k) for k in SPECIAL_TOKENS if k in known}
                # a multiple of 64 suits the hardware
                special["vocab_size"] = -(-len(tokenizer) // 64) * 64
                settings = special | settings
            config = AutoConfig.for_model(**settings)
    except (OSError, TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise InputError(f"model: {shorten(str(error), 300)}") from None
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise InputError(
            f"model.vocab_size: {config.vocab_size} is less than the tokenizer's "
            f"{len(tokenizer)} tokens"
        )
    heads = getattr(config, "num_attention_heads", 0)
    groups = getattr(config, "num_key_value_heads", None) or 1
    if heads % groups:
        raise InputError(f"model.num_key_value_heads: {groups} does not divide the {heads} heads")
    positions = getattr(config, "max_position_embeddings", sequence_length)
    if sequence_length > positions:
        raise InputError(
            f"sequence_length: {sequence_length} is more than the model's "
            f"max_position_embeddings of {positions}"
        )
    return config


def build_model(
    arguments: ModelArguments,
    config: Any,
    auto_model: Any,
    seed: int,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> PreTrainedModel:
    """The model: from given weights, or initialised as a function of the seed.

    What the given weights do not hold (the head of a new task) is initialised in the same way, and
    named in the model's `newly_initialized`.

    Args:
        auto_model: AutoModelForCausalLM or another class of its kind.
        options: more of `from_pretrained`.

    Raises:
        InputError: no such model, or weights of another shape than the configuration's.
    """
    options |= {"dtype": dtype, "attn_implementation": arguments.attn_implementation}
    name, loading = arguments.model_name_or_path, {}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is reported here, or meant to be
    logging.disable_progress_bar()
    try:
        if name:
            model, loading = auto_model.from_pretrained(
                name,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        else:
            model = auto_model.from_config(config, **options)
    except (ImportError, OSError, ValueError) as error:
        raise InputError(f"model: {shorten(str(error), 300)}") from None
    finally:
        logging.set_verbosity(verbosity)
    new = {
        *loading.get("missing_keys", ()),
        *(key for key, *_ in loading.get("mismatched_keys", ())),
    }
    inside = [key for key in new if key.startswith(f"{model.base_model_prefix}.")]
    body = [key for key in inside if "pooler" not in key]  # which pretraining may have left out
    if name and body:
        raise InputError(
            f"model_name_or_path: {name} has no weights of this shape for {min(body)}: "
            "it is another architecture, or another size"
        )
    if not name or new:
        initialize_weights(model, seed, new if name else None)
    model.newly_initialized = sorted(new) if name else []
    # that of the given weights may be another head's
    model.config.architectures = [type(model).__name__]
    return model
