"""Tokenizer, configuration and model of a run: from scratch, or on from given weights."""

import inspect
import math
import re
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from operator import itemgetter
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from utils.config import InputError
from utils.initialisation import InitializationArguments, initialize_weights
from utils.model_settings import (
    SIZES,
    check_buildable,
    class_of_its_own,
    load_model,
    load_pretrained,
    max_positions,
    quiet,
    settings_read,
    tokenizer_settings,
)
from utils.program import looked_for, say

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# numbers, accents, lines and blanks: where tokenizers differ
READ_BY_BOTH = "The 12345 words, né e\u0301:\n\n    x = 1 \n"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")


@dataclass
class ModelArguments(InitializationArguments):
    """What is trained."""

    tokenizer: str | None = None  # required, unless model_name_or_path has it: a folder or Hub name
    model_name_or_path: str | None = None  # continue from these weights; null: from scratch
    # From scratch: the architecture, as transformers' config classes name its settings. The
    # vocabulary and the special tokens come from the tokenizer unless they are given.
    model: dict[str, Any] = field(default_factory=lambda: {"model_type": "llama"})
    attn_implementation: str | None = None  # sdpa, eager, flex_attention or flash_attention_2
    trust_remote_code: bool = False  # run the Python that comes with a model or a tokenizer

    def check(self) -> None:
        if self.tokenizer_name is None:
            raise InputError("tokenizer: give a folder or Hub name")
        super().check()

    @property
    def tokenizer_names(self) -> dict[str, str | None]:
        """By setting where the tokenizer may be: the first that is given is taken."""
        return {"tokenizer": self.tokenizer, "model_name_or_path": self.model_name_or_path}

    @property
    def tokenizer_name(self) -> str | None:
        return next(filter(None, self.tokenizer_names.values()), None)


def load_tokenizer(arguments: ModelArguments, **options: Any) -> Any:
    """The tokenizer, as it will be read where the export is.

    For some types of models (Qwen2) transformers takes a class of their own, whatever is in the
    tokenizer's files.

    Args:
        options: more of `from_pretrained`, which are exported with the tokenizer.

    Raises:
        InputError: there is none, or one without a vocabulary, or not for that class.
    """
    name, trust = arguments.tokenizer_name, arguments.trust_remote_code
    try:
        options |= {"config": _config_beside(arguments)} if arguments.tokenizer else {}
        tokenizer = load_pretrained(transformers.AutoTokenizer, name, trust, **options)
    except InputError:
        raise
    except Exception as error:  # of any kind, if tokenizer.json is some other JSON
        setting = next(key for key, given in arguments.tokenizer_names.items() if given)
        what = "" if setting == "tokenizer" else "the tokenizer of "
        raise InputError(f"{setting}: cannot load {what}{name}: {_reason(name, error)}") from None
    if not tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}:
        raise InputError(f"tokenizer: {name} has no vocabulary: special tokens are all it knows")
    kind = type(tokenizer)
    if arguments.tokenizer and kind is not transformers.PreTrainedTokenizerFast:
        own = load_pretrained(transformers.AutoTokenizer, name, trust)
        ids = [each.encode(READ_BY_BOTH, add_special_tokens=False) for each in (own, tokenizer)]
        texts = (each.decode(i) for each, i in zip((own, tokenizer), ids, strict=True))
        if len({unicodedata.normalize("NFC", text) for text in texts}) > 1:
            raise InputError(
                f"tokenizer: for this type of model transformers reads {name} as {kind.__name__}, "
                "which loses text: give a tokenizer of that kind, or another model_type"
            )
        if ids[0] != ids[1]:
            say(f"{name} is read as {kind.__name__}, as transformers does for this type of model")
    return tokenizer


def _config_beside(arguments: ModelArguments) -> Any:
    """Of the type of the model; None where there is none, which `model_config` says."""
    with suppress(OSError, ValueError, KeyError):
        if arguments.model_name_or_path:
            given, trust = arguments.model_name_or_path, arguments.trust_remote_code
            return load_pretrained(transformers.AutoConfig, given, trust)
        return transformers.AutoConfig.for_model(arguments.model.get("model_type"))
    return None


def _reason(name: str, error: Exception) -> str:
    """Why nothing could be loaded from a folder or a name of the Hub."""
    for path in filter(Path.is_file, sorted(Path(name).glob("*"))):
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"{path.name} is a pointer of Git LFS, not the file: run git lfs pull"
    if not Path(name).exists() and (name.count("/") > 1 or name.startswith(("/", "."))):
        return f"there is no such folder{looked_for(name)}"
    kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
    return kind + shorten(str(error), 300) + looked_for(name)


def _does_not_load(name: str | None, error: Exception) -> InputError:
    if name is None:
        return InputError(f"model: {shorten(str(error), 300)}")
    return InputError(f"model_name_or_path: cannot load {name}: {_reason(name, error)}")


def model_config(arguments: Any, tokenizer: Any = None) -> Any:
    """The configuration of the model, checked against the tokenizer and the length of a row.

    Args:
        arguments: `TrainingArguments` and `ModelArguments`.
        tokenizer: where it is not given, it is loaded if the settings leave something to it.
    """
    settings, given = dict(arguments.model), arguments.model_name_or_path
    if tokenizer is None and (given or "vocab_size" not in settings):
        tokenizer = load_tokenizer(arguments)
    try:
        if given:
            config = load_pretrained(transformers.AutoConfig, given, arguments.trust_remote_code)
        else:
            if "model_type" not in settings:
                raise InputError("model: model_type is missing: llama, bert or another")
            defaults = type(transformers.AutoConfig.for_model(settings["model_type"]))()
            declared = defaults.to_dict().keys() | defaults.attribute_map.keys()
            known = declared | settings_read(type(defaults))
            if unknown := settings.keys() - known:
                own = known - transformers.PreTrainedConfig().to_dict().keys()
                near = get_close_matches(min(unknown), own or known, 1, 0)
                raise InputError(
                    f"model: {defaults.model_type} has no setting {min(unknown)!r}: "
                    f"the nearest valid one is {near[0]!r}"
                )
            sizes = {*SIZES, *map(defaults.attribute_map.get, SIZES)}
            for name, value in settings.items():
                if name in sizes and isinstance(value, int) and value < 1:
                    raise InputError(f"model.{name}: {value} is less than 1")
            if tokenizer is not None:
                special = {k: getattr(tokenizer, k) for k in SPECIAL_TOKENS if k in declared}
                # a multiple of 64 suits the hardware
                special["vocab_size"] = -(-len(tokenizer) // 64) * 64
                settings = special | settings
            config = transformers.AutoConfig.for_model(**settings)
    except (OSError, TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise _does_not_load(given, error) from None
    text = config.get_text_config(decoder=True)
    # a model made of two has a vocabulary for each; that of given weights grows by added tokens
    room = getattr(text, "vocab_size", math.inf)
    room += len(getattr(arguments, "add_tokens", ())) if given else 0
    if tokenizer is not None and len(tokenizer) > room:
        problem = f"{text.vocab_size} is less than the tokenizer's {len(tokenizer)} tokens"
        raise InputError(f"model.vocab_size: {problem}")
    if given and arguments.tokenizer:
        _check_vocabulary(tokenizer, arguments)
    if not given:
        check_buildable(config)
    if arguments.attn_implementation == "flex_attention" and not (
        getattr(arguments, "dry_run", False) or torch.accelerator.is_available()
    ):
        raise InputError("attn_implementation: flex_attention trains on GPUs alone: set sdpa")
    length = arguments.row_length
    # null: a recipe whose rows have two parts checks each of them
    positions, name = max_positions(config)
    if arguments.sequence_length is not None and length > positions:
        raise InputError(
            f"sequence_length: {length} is more than the model's {name} of {positions}"
        )
    return config


def _check_vocabulary(tokenizer: Any, arguments: ModelArguments) -> None:
    """Raises InputError where ids mean other tokens to the given model, as its own tokenizer tells.

    What that one knows as special or unused may have got another name.
    """
    name, given = arguments.tokenizer, arguments.model_name_or_path
    # without files transformers makes up an empty tokenizer
    if name == given or not tokenizer_settings(given):
        return
    own = load_pretrained(transformers.AutoTokenizer, given, arguments.trust_remote_code)
    special, known = {*own.added_tokens_decoder}, {i: t for t, i in own.get_vocab().items()}
    for token, index in sorted(tokenizer.get_vocab().items(), key=itemgetter(1)):
        was = known.get(index, token)
        if was != token and index not in special and not re.search("unused|reserved|extra", was):
            raise InputError(
                f"tokenizer: {name} is not that of {given}: its token {index} is {token!r}, there "
                f"it is {was!r}: leave tokenizer out"
            )


def build_model(
    arguments: Any, config: Any, auto_model: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> "transformers.PreTrainedModel":
    """The model: from given weights, or initialised as a function of the seed.

    What the given weights do not hold (the head of a new task) is initialised in the same way, and
    named in the model's `newly_initialized`.

    Args:
        arguments: `TrainingArguments` and `ModelArguments`.
        auto_model: AutoModelForCausalLM or another class of its kind.
        options: more of `from_pretrained`.

    Raises:
        InputError: no such model, or weights of another shape than the configuration's.
    """
    if (Path(arguments.model_name_or_path or "") / "adapter_config.json").exists():
        raise InputError(
            f"model_name_or_path: {arguments.model_name_or_path} holds an adapter: give it as "
            "adapter_name_or_path, and its base here"
        )
    options |= {"dtype": dtype, "attn_implementation": arguments.attn_implementation}
    name, new = arguments.model_name_or_path, set()
    try:
        with quiet():
            if name:
                options |= {"config": config}
                model, new = load_model(auto_model, name, arguments.trust_remote_code, **options)
            else:
                model = auto_model.from_config(config, **options)
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # of any kind, where the weights are some other file
        raise _does_not_load(None if isinstance(error, ImportError) else name, error) from None
    if getattr(arguments, "new_head", False):
        keys = (key for key, _ in model.named_parameters())
        new |= {key for key in keys if not key.startswith(f"{model.base_model_prefix}.")}
    train_shared_padding(model)
    inside = [key for key in new if key.startswith(f"{model.base_model_prefix}.")]
    body = [key for key in inside if "pooler" not in key]  # which pretraining may have left out
    if name and body:
        raise InputError(
            f"model_name_or_path: {name} has no weights of this shape for {min(body)}: "
            "it is another architecture, or another size"
        )
    if not name or new:
        initialize_weights(model, arguments.seed, new if name else None, arguments)
    model.newly_initialized = sorted(new) if name else []
    # that of the given weights may be another head's
    model.config.architectures = [type(model).__name__]
    return model


def empty_model(
    config: Any, auto_model: Any = None, device: str = "meta"
) -> "transformers.PreTrainedModel":
    """The language model that a transformers config describes, built without storage.

    Args:
        auto_model: AutoModelForCausalLM, which it is unless given, or another class of its kind.
        device: where there is storage, its weights are still to be initialised.

    Raises:
        InputError: transformers has no such language model for this config.
    """
    auto_model = auto_model or transformers.AutoModelForCausalLM
    models = auto_model._model_mapping
    model_class = class_of_its_own(config, auto_model.__name__)
    if model_class is None and type(config) not in models:
        kind = auto_model.__name__.removeprefix("AutoModelFor")
        raise InputError(f"transformers has no model for {kind} of type {config.model_type!r}")
    model_class = model_class or models[type(config)]
    # of a composite config (Qwen3_5Config), as `from_config` does it
    if model_class.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    # not `from_config`: it would split the weights over the processes where ZeRO-3 is set up
    with torch.device(device):
        return model_class(config)


def train_shared_padding(model: "transformers.PreTrainedModel") -> None:
    """Train the embedding of a pad token that is an input, too: as end or begin of a document.

    `padding_idx` would keep it from ever having a gradient, and from scratch at 0.
    """
    config = model.config.get_text_config(decoder=True)
    inputs = [getattr(config, name, None) for name in SPECIAL_TOKENS if name != "pad_token_id"]
    inputs = {t for value in inputs for t in (value if isinstance(value, list) else [value])}
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        # RoBERTa counts its positions from that of the padding
        is_of_words = hasattr(module, "weight") and "position" not in name
        if padding is not None and padding in inputs and is_of_words:
            module.padding_idx = None


def optional_inputs(model: "transformers.PreTrainedModel") -> list[str]:
    """Which of position_ids and token_type_ids the model takes."""
    takes = inspect.signature(model.base_model.forward).parameters
    # a model with one type only (RoBERTa) knows it
    has_types = getattr(model.config, "type_vocab_size", 0) > 1
    names = ("position_ids", "token_type_ids") if has_types else ("position_ids",)
    return [name for name in names if name in takes]


def first_position(model: "transformers.PreTrainedModel") -> int:
    """The position id of a sequence's first token.

    RoBERTa's begin after that of the padding; MRA's, Nyströmformer's and YOSO's leave out what
    their tables have beyond max_position_embeddings.
    """
    table, most = _positions(model)
    padding = getattr(table, "padding_idx", None)
    if padding is not None:
        return padding + 1
    return max(0, getattr(table, "num_embeddings", 0) - most)


def check_positions(model: "transformers.PreTrainedModel", sequence_length: int) -> None:
    """Raises InputError when an encoder has fewer positions than a row tokens."""
    table, most = _positions(model)
    positions = getattr(table, "num_embeddings", None) or most
    if first_position(model) + sequence_length > positions:
        raise InputError(
            f"sequence_length: {sequence_length} and the model's first position "
            f"{first_position(model)} are more than its max_position_embeddings of {positions}"
        )


def _positions(model: "transformers.PreTrainedModel") -> tuple[Any, float]:
    """(the table of an encoder's positions, if it has one; how many its configuration allows)"""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    most = getattr(model.config, "max_position_embeddings", None) or 0
    return table, most if most > 0 else math.inf  # XLNet says -1
