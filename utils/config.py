"""Strict settings: a dataclass's defaults < a YAML file < the command line.

A recipe declares its settings as a dataclass, one field a line, the help text in the comment that
ends the line or stands above it:

    @dataclass
    class Arguments:
        output_dir: str  # where everything this run writes goes
        learning_rate: float = 3e-4  # the peak, after warmup

and reads them with `parse(Arguments)`:

    recipe.py CONFIG.yaml --learning_rate 1e-4 --model.hidden_size 64 --sources.0.weight 2 --dry_run
"""

import dataclasses
import itertools
import re
import signal
import sys
import time
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING
from difflib import get_close_matches
from typing import Any

import yaml

from utils.program import (
    InputError,
    alternatives,
    assign,
    at_end,
    declared,
    default,
    in_brief,
    launched_rank,
    leave,
    looked_for,
    options,
    plain,
    say,
    show,
    spell,
    usage,
)

SILENCE = 5.0  # seconds a silent rank outlives its error: the launcher ends all with the first
CONFIG_BYTES, CONFIG_VALUES = 2**20, 100_000  # a few lines of aliases can stand for billions

# what TRL, transformers, axolotl and litgpt call it: what it is here, the first that a recipe has
ELSEWHERE = """
base_model model_id checkpoint_dir: model_name_or_path; lora_target_modules: lora.target_modules
val_set_size: validation_split; resume_from_checkpoint: resume; model_type: model.model_type
test_file test_data test_sources: test_sources | test_data; config_name: name | train_sources.0.name
train_file train_data train_sources pretraining_dataset: train_sources | train_data; lora_r: lora.r
dataset datasets dataset_name data data_path: train_sources | train_data | path
validation_file validation_sources eval_dataset val_data: validation_sources | validation_data
block_size sequence_len seq_len max_seq_len model_max_length: sequence_length; data_files file: path
dataset_text_field text_column: text_field | train_sources.0.text_field; bf16: mixed_precision: bf16
max_seq_length max_length: max_source_length | sequence_length | max_new_tokens
per_device_train_batch_size micro_batch_size batch_size: per_device_batch_size
precision torch_dtype dtype: mixed_precision | dtype; gradient_accumulation_steps: global_batch_size
num_epochs epochs: num_train_epochs; use_peft peft_config adapter: lora; fp16: mixed_precision: fp16
load_in_4bit: teacher.dtype: 4bit; gradient_clipping: max_grad_norm; lora_dropout: lora.lora_dropout
flash_attention use_flash_attention_2: attn_implementation: flash_attention_2
save_total_limit: keep_last; lora_alpha: lora.lora_alpha; lmbda: on_policy_share; lr: learning_rate
evaluation_strategy eval_strategy: eval_steps; log_with logger_name wandb_project: report_to
teacher_model_name_or_path: teacher.model_name_or_path; lora_model_dir: adapter_name_or_path
"""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain words: 1e-5 is a number; no, 0123 and 2024-01-31 are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, words) for tag, words in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number."""


_BOOL = re.compile(r"(true|false)$", re.IGNORECASE)
_FLOAT = re.compile(r"[-+]?(\d*\.\d+|\d+\.|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.inf$|\.nan$")
_INT = re.compile(r"[-+]?(0|[1-9]\d*|[1-9]\d{0,2}(_\d{3})+)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, "tTfF")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, "-+0123456789")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, "-+.0123456789")


class Settings:
    """A part of a recipe's settings; each part hands `check` and `fixed` on to the next."""

    def check(self) -> None:
        """Raises InputError for what only several fields together get wrong."""

    def fixed(self) -> dict[str, Any]:
        """By name, what must not change over the life of a run."""
        return {}


def command(main: Callable[[], None]) -> typing.NoReturn:
    """Run `main` as a program: an `InputError` is printed once, not by every rank; status 2.

    Ctrl-C where `main` does not handle it ends the program without a traceback; status 130.
    """
    at_end.is_program = True
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as it is while a script imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # text that is no Unicode is shown as stderr has it
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with at_end:
            main()
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done
        sys.exit(0)
    except KeyboardInterrupt:
        status = 130
    except InputError as error:
        if error.one_rank or launched_rank() == 0:
            show(f"error: {in_brief(error)}", sys.stderr)
        else:
            time.sleep(SILENCE)
        status = 2
    except BrokenPipeError:
        status = 141
    with suppress(OSError):
        sys.stdout.flush()
    leave(status)  # other ranks may wait in a collective; exit hooks would wait for ever


def parse(settings: type | tuple[type, ...], argv: list[str] | None = None) -> Any:
    """Read `[CONFIG.yaml] [--key value …]` into `settings`, of several the one of most of the keys.

    Values on the command line are YAML (`--sources '[{path: a.jsonl}]'`), but text as it stands
    for a field whose type is `str` or a union that begins with it (`--prompt "def "`); a dotted
    key reaches inside (`--model.hidden_size 64`, `--sources.0.path b.jsonl`); a key alone is true.
    `check(self)`, if there is one, raises `InputError` for what only several fields get wrong.

    Raises:
        InputError: unknown key, one twice in the file, wrong type, missing value, unreadable file.
    """
    argv = sys.argv[1:] if argv is None else argv
    kinds = settings if isinstance(settings, tuple) else (settings,)
    if "--help" in argv or "-h" in argv:
        if launched_rank() == 0:
            show(usage(kinds), sys.stdout)  # as it is: Python 3.14 colours it on a terminal
        sys.exit(0)
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    if argv and not argv[0].startswith("-"):
        values, places = read_yaml(argv[0])
        argv = argv[1:]
    given = options(argv)
    keys = {*values, *(key.partition(".")[0].replace("-", "_") for key, _ in given)}
    settings = max(kinds, key=lambda kind: len(keys & kind.__dataclass_fields__.keys()))
    mine, *rest = (kind.__dataclass_fields__.keys() for kind in (settings, *kinds))
    if foreign := sorted(keys & set().union(*rest) - mine):
        own = min(keys & mine - set.intersection(*map(set, rest)), default="its other keys")
        raise InputError(f"{foreign[0]!r} does not go with {own!r}: two kinds of runs; give one")
    defaults = {field.name: default(field) for field in dataclasses.fields(settings)}
    is_printed = False
    for typed, text in given:
        key, hint = declared(settings, typed)
        if text is None and hint is not None and bool not in alternatives(hint):
            raise InputError(f"--{typed} has no value: write --key value or --key=value")
        value = True if text is None else _read_word(text, hint)
        if key == "print_config":
            is_printed = _convert(value, bool, key, {key: f"--{typed}"})
            continue
        top, dot, _ = key.partition(".")
        if dot and top not in values and defaults.get(top, MISSING) is not MISSING:
            values[top] = plain(defaults[top])  # a dotted key changes a part of the default
        values[top] = spelled_out(values.get(top), declared(settings, top)[1])
        assign(values, key, value)
        # what was set below this key is replaced along with it
        places = {k: v for k, v in places.items() if k != key and not k.startswith(key + ".")}
        places[key] = f"--{typed}"
    result = _build(settings, values, "", places)
    if hasattr(result, "check"):
        result.check()
    if is_printed:
        say(as_yaml(result).rstrip())
        sys.exit(0)
    return result


def as_yaml(settings: Any) -> str:
    """Of a settings dataclass, or of what it holds; `parse` reads it back equal."""
    values = settings if isinstance(settings, dict) else dataclasses.asdict(settings)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=100)


def _read_word(text: str, hint: Any) -> Any:
    """A value of the command line: as it stands where text is wanted first, else YAML."""
    choices = alternatives(hint)
    if choices[0] is str and not (text == "null" and type(None) in choices):
        return text  # YAML would strip the blank of "def " and read "class A:" as a mapping
    try:
        return _load(text, "", {})
    except (yaml.YAMLError, ValueError):
        return text


def spelled_out(value: Any, hint: Any) -> Any:
    """A path stands for a mapping of it alone, and what should be a list for its only entry."""
    inside = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
    if not dataclasses.is_dataclass(inside):
        return value
    if inside is not hint:
        entries = [value] if isinstance(value, str | dict) else value
        return [spelled_out(e, inside) for e in entries] if isinstance(entries, list) else value
    first = dataclasses.fields(hint)[0]
    is_path = isinstance(value, str) and default(first) is MISSING
    return {first.name: value} if is_path else value


def read_yaml(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A YAML mapping and, per dotted key, the place ("file, line n") where it stands."""
    try:
        with open(path, "rb") as file:
            text = file.read(CONFIG_BYTES + 1).decode()
    except OSError as error:
        problem = f"{error.strerror}{looked_for(path)}"
        raise InputError(f"cannot read the config {path}: {problem}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not YAML: it is not even text in UTF-8") from None
    places: dict[str, str] = {}
    try:
        if len(text) > CONFIG_BYTES:
            raise ValueError(f"it has more than {CONFIG_BYTES:,} bytes")
        values = _load(text, path, places)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise InputError(f"{path} holds no settings: expected lines of 'key: value'")
    return values or {}, places


def _load(text: str, path: str, places: dict[str, str]) -> Any:
    """The values of a YAML text, whose places are noted; raises YAMLError or ValueError."""
    nodes = itertools.count()

    def collect(node: yaml.Node, prefix: str) -> None:
        if next(nodes) == CONFIG_VALUES:
            raise ValueError(f"with its aliases (*name) it has more than {CONFIG_VALUES:,} values")
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = f"{prefix}{key.value}"
                where = f"{path}, line {key.start_mark.line + 1}"
                if name in places:
                    raise InputError(f"{where}: {name!r} is set twice (also: {places[name]})")
                places[name] = where
                collect(value, f"{name}.")
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                places[f"{prefix}{index}"] = f"{path}, line {value.start_mark.line + 1}"
                collect(value, f"{prefix}{index}.")

    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        collect(node, "")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _build(settings: type, values: Any, prefix: str, places: dict[str, str]) -> Any:
    where = _where(prefix[:-1], places)
    if not isinstance(values, dict):
        raise InputError(f"{where}{prefix[:-1]} must be settings, not {values!r}")
    fields = {field.name: field for field in dataclasses.fields(settings)}
    hints = typing.get_type_hints(settings)
    for key in values:
        if key not in fields:
            answer, (name,) = "the nearest valid one is", get_close_matches(str(key), fields, 1, 0)
            for line in re.split("; |\n", ELSEWHERE):
                theirs, _, ours = line.partition(": ")
                known = [n for n in ours.split(" | ") if re.split(r"\W", n)[0] in fields]
                if key in theirs.split() and known:
                    answer, name = "here it is", known[0]
                    break
            raise InputError(
                f"{_where(f'{prefix}{key}', places)}unknown key {f'{prefix}{key}'!r}: "
                f"{answer} {prefix + name!r}"
            )
    result = {}
    for name, field in fields.items():
        if name in values:
            result[name] = _convert(values[name], hints[name], f"{prefix}{name}", places)
        elif default(field) is MISSING:
            raise InputError(f"{where}{prefix}{name} is missing: it has no default")
    return settings(**result)


def _convert(value: Any, hint: Any, key: str, places: dict[str, str]) -> Any:
    value = spelled_out(value, hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        choices = [choice for choice in arguments if choice is not type(None)]
        if len(choices) == 1:
            return _convert(value, choices[0], key, places)
        for choice in sorted(choices, key=lambda choice: type(value) is not choice):
            try:
                return _convert(value, choice, key, places)
            except InputError:
                continue
    elif dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{key}.", places)
    elif origin is typing.Literal and value in arguments:
        return value
    elif origin is list and isinstance(value, list):
        return [_convert(v, arguments[0], f"{key}.{i}", places) for i, v in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {k: _convert(v, arguments[1], f"{key}.{k}", places) for k, v in value.items()}
    elif hint is typing.Any:
        return value
    elif hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    elif hint is str and type(value) is int:
        return str(value)
    raise InputError(f"{_where(key, places)}{key} must be {spell(hint)}, not {value!r}")


def _where(key: str, places: dict[str, str]) -> str:
    while key and key not in places:
        key = key.rpartition(".")[0]
    return f"{places[key]}: " if key else ""
