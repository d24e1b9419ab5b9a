"""What is loaded by name, and with whose code; what of it is written beside weights; what the
settings of a transformers config are called, and which of them cannot be."""

import copy
import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.utils import logging

from utils.config import InputError
from utils.integrity import check_weights

GENERATION = "generation_config.json"
# by what names configs call the same
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
HEADS = ("num_attention_heads", "num_key_value_heads")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", *HEADS)


def load_pretrained(kind: Any, name: str, trust_remote_code: bool, **options: Any) -> Any:
    """`kind.from_pretrained`, which asks nobody, and runs no code unless it is trusted.

    Raises:
        InputError: it needs code of its own.
    """
    code = ", ".join(sorted(path.name for path in Path(name).glob("*.py"))) or "auto_map"
    refusal = InputError(
        f"{name} needs code of its own ({code}): it is run only with trust_remote_code: true"
    )
    try:
        found = kind.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except ValueError as error:
        raise (refusal if "trust_remote_code" in str(error) else error) from None
    # what was read without its code names none where it is saved
    if kind is transformers.AutoConfig and not trust_remote_code:
        vars(found).pop("auto_map", None)
    if kind is transformers.AutoTokenizer and not trust_remote_code:
        # of a type of model that it knows, transformers takes another class in silence
        own = tokenizer_settings(name).get("tokenizer_class", "AutoTokenizer")
        if found.init_kwargs.pop("auto_map", None) and not hasattr(transformers, str(own)):
            raise refusal
    return found


def tokenizer_settings(name: str) -> dict[str, Any]:
    """What tokenizer_config.json says; nothing, where there is none."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config  # half a second

    return get_tokenizer_config(name)


def load_model(
    kind: Any, name: str, trust_remote_code: bool = False, **options: Any
) -> tuple[Any, set[str]]:
    """(the model, the names of what its files do not hold, or in another shape).

    Args:
        kind: a class of models or an auto class, whose `from_pretrained` takes `options`.

    Raises:
        InputError: it needs code of its own, or its weights are pickled or not what was written.
    """
    names = getattr(options.get("config"), "architectures", None) or [kind.__name__]
    check_not_pickled(name, f"transformers.{names[0]}.from_pretrained({name!r})")
    check_weights(name)
    reported = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= reported | {"use_safetensors": True}
    model, loading = load_pretrained(kind, name, trust_remote_code, **options)
    return model, loading["missing_keys"] | {key for key, *_ in loading["mismatched_keys"]}


def quantization(bits: str, dtype: torch.dtype) -> Any:
    """Of linear layers: "8bit" (LLM.int8, Dettmers et al. 2022) or "4bit" (NF4, its scales
    quantized too: Dettmers et al. 2023, QLoRA), which compute in `dtype`."""
    if bits == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check_not_pickled(folder: str, loading: str) -> None:
    """Raises InputError for pickled weights alone; `loading`: the Python that reads them."""
    for pickled, safe in (("pytorch_model*.bin", "model*"), ("adapter_model.bin", "adapter_model")):
        found = min(Path(folder).glob(pickled), default=None)
        if found and not any(Path(folder).glob(f"{safe}.safetensors")):
            raise InputError(
                f"{folder} has no weights but pickled ones ({found.name}), which may hold code: "
                f"where they are trusted, write safetensors: {loading}.save_pretrained({folder!r})"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing but errors: what is missing is reported here, or meant to be."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


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
