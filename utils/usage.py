"""Settings for people: the `--help` text of a dataclass, and its types in words."""

import dataclasses
import inspect
import json
import types
import typing
from dataclasses import MISSING
from typing import Any


def usage(settings: type) -> str:
    """The `--help` text: the dataclass's docstring and each field with type, default and help."""
    lines = [inspect.cleandoc(settings.__doc__ or ""), "", "usage: [CONFIG.yaml] [--key value …]"]
    return "\n".join([*lines, *_field_lines(settings, "--")])


def _field_lines(settings: type, prefix: str) -> list[str]:
    lines = []
    help_texts = _help_texts(settings)
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        value = default(field)
        shown = "required" if value is MISSING else json.dumps(plain(value))
        lines.append(f"  {key}  {spell(hint)}, {shown}")
        if help_texts.get(field.name):
            lines.append(f"      {help_texts[field.name]}")
        for choice in alternatives(hint):
            index = "0." if typing.get_origin(choice) is list else ""
            inner = typing.get_args(choice)[0] if index else choice
            if dataclasses.is_dataclass(inner):
                lines += _field_lines(inner, f"{key}.{index}")
    return lines


def alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def default(field: dataclasses.Field) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def plain(value: Any) -> Any:
    """The same in dicts and lists, as YAML would give it."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


def spell(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(spell(argument) for argument in arguments)
    if origin is typing.Literal:
        return " or ".join(json.dumps(argument) for argument in arguments)
    if origin is list:
        return f"a list of {spell(arguments[0])}"
    if origin is dict:
        return "a mapping"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _help_texts(settings: type) -> dict[str, str]:
    """Field name → the comment that ends its line, or that stands on the lines above it."""
    texts: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        above: list[str] = []
        for line in inspect.getsource(base).splitlines():
            code, _, comment = line.strip().partition("#")
            name = code.partition(":")[0].strip()
            if not code and comment:
                above.append(comment.strip())
                continue
            if name in base.__annotations__:
                texts[name] = " ".join([*above, comment.strip()]).strip()
            above = []
    return texts
