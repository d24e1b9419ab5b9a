"""A recipe as a program: what it says on the screen, its `--help`, and how it ends."""

import dataclasses
import functools
import glob
import inspect
import json
import multiprocessing.util
import os
import re
import select
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, ExitStack, contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TextIO

LONGEST = 2000  # characters of an error
PATIENCE = 5  # seconds that a run is silent at most
# what moves a terminal's cursor, turns the direction of writing, or is no character at all
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: Any) -> str:
    """On one line, with escapes in the place of what a terminal, a file or a font cannot show."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def launched_rank() -> int:
    """Of this process among those that the launcher has started; before they have joined."""
    return int(os.environ.get("RANK", 0))


def say(text: str) -> None:
    """Lines on the screen, of the first rank."""
    if text and launched_rank() == 0:
        show("\n".join(map(printable, text.split("\n"))), sys.stdout)


def warn(message: str, each_rank: bool = False) -> None:
    """A line on the screen, of the first rank alone unless each has to say it."""
    if each_rank or launched_rank() == 0:
        start = "\r\033[K" if sys.stderr.isatty() else ""  # a progress bar may stand there
        show(f"{start}warning: {in_brief(message)}", sys.stderr)


warn_once = functools.cache(warn)


def show(text: str, stream: TextIO) -> None:
    """Print; where the terminal is closed or nobody reads the pipe, nothing is written any more."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        for descriptor in (1, 2):  # libraries write there, too
            output = select.poll()
            output.register(descriptor, 0)  # what is told without being asked for: it has no end
            if output.poll(0):
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), descriptor)


def in_brief(message: Any) -> str:
    """As a line, and without its middle where that is long: what to do stands at the end."""
    line = printable(message)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 500]} … {line[-500:]}"


@contextmanager
def announced(what: str | Callable[[], str], each_rank: bool = False) -> Iterator[None]:
    """Around what may take long: every few seconds a line says that it goes on."""
    end, start = threading.Event(), time.monotonic()

    def speak() -> None:
        while not end.wait(PATIENCE):
            doing = what if isinstance(what, str) else what()
            print(printable(f"{doing} … {time.monotonic() - start:.0f} s"), flush=True)

    if each_rank or launched_rank() == 0:
        threading.Thread(target=speak, daemon=True).start()
    try:
        yield
    finally:
        end.set()


@contextmanager
def spared(what: str, but: type[BaseException] = KeyboardInterrupt) -> Iterator[None]:
    """Around what is worth less than the run: if it fails, a line says so and the run goes on.

    Args:
        but: what ends the run all the same, beside Ctrl-C.
    """
    try:
        yield
    except (KeyboardInterrupt, but):
        raise
    except BaseException as error:  # what Rust raises is no Exception
        warn(f"{what}: {type(error).__name__}: {error}", each_rank=True)


def looked_for(path: str) -> str:
    """To end a message on a relative path that is not there: from which folder, and where it is."""
    if not path or os.path.isabs(path) or "://" in path or glob.glob(path):
        return ""
    here, config = Path.cwd(), Path(sys.argv[1] if len(sys.argv) > 1 else ".").absolute()
    for folder in (Path(__file__).parents[1], *here.parents, *config.parents):
        if folder != here and glob.glob(os.path.join(glob.escape(str(folder)), path)):
            return f"; {path} exists from {folder}: start there, or give an absolute path"
    return f"; looked for from {here}"


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


class _AtEnd(ExitStack, ContextDecorator):
    """What is given back when the decorated `main` ends, however it does."""

    is_program = False  # whether the process ends then


at_end = _AtEnd()


def leave(status: int) -> typing.NoReturn:
    """End this process and its data workers at once, whatever they wait for."""
    for worker in multiprocessing.active_children():
        worker.kill()
    multiprocessing.util._run_finalizers(0)  # else it is said of their semaphores that they leak
    os._exit(status)
