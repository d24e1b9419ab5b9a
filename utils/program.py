"""A recipe as a program: what it says on the screen, its `--help`, and how it ends."""

import argparse
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ContextDecorator, ExitStack, contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NamedTuple, TextIO

LONGEST = 2000  # characters of an error
WIDTH = 80  # of the help
# what most configs set, in the order of what has to be decided
USUAL = """
model_name_or_path tokenizer model train_sources train_data validation_sources validation_data
output_dir sequence_length global_batch_size per_device_batch_size mixed_precision learning_rate
lr_scheduler_type warmup_steps max_steps num_train_epochs eval_steps save_steps logging_steps
"""
NOTE = (
    "CONFIG.yaml holds lines of 'key: value', which options override. --key alone means true. "
    "--print_config prints all settings as such a file and ends."
)
PATIENCE = 5  # seconds that a run is silent at most
# what moves a terminal's cursor, turns the direction of writing, or is no character at all
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(Exception):
    """What the person at the terminal can mend: says what is wrong, where, and what to do.

    Args:
        one_rank: met by one process alone, which has to say it.
    """

    def __init__(self, message: str, one_rank: bool = False):
        super().__init__(message)
        self.one_rank = one_rank


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


class _Row(NamedTuple):
    text: str
    group: type  # the class that declares it first
    need: str  # how it is named among what is required; empty: it is not


def usage(kinds: Sequence[type]) -> str:
    """The `--help` text: what is required, what most runs set, the rest by what declares it.

    Required is what has no default, and where the comment begins with that word.
    """
    screen = argparse.HelpFormatter(Path(sys.argv[0]).name, max_help_position=28, width=WIDTH)

    def table(heading: str, rows: dict[str, _Row], note: str = "", start: str = "--") -> None:
        if not rows:
            return
        heading, _, more = inspect.cleandoc(heading).partition("\n\n")
        screen.start_section(heading.removesuffix("."))
        screen.add_text(f"{more} {note}".strip() or None)
        for name, row in rows.items():
            text = row.text.replace("%", "%%")
            screen.add_argument(argparse.Action([f"{start}{name}"], name, nargs=0, help=text))
        screen.end_section()

    tables = [_rows(kind) for kind in kinds]
    screen.add_usage("%(prog)s [CONFIG.yaml] [--key value …]", [], [])
    for kind, rows in zip(kinds, tables, strict=True):
        needs = "; ".join(row.need for row in rows.values() if row.need)
        screen.add_text(f"{kind.__doc__} Required: {needs or 'nothing'}.")
    screen.add_text(NOTE)
    common = {n: row for n, row in tables[0].items() if all(t.get(n) == row for t in tables)}
    own = [{n: row for n, row in table.items() if n not in common} for table in tables]
    for kind, rows in zip([kinds[0], *kinds], [common, *own], strict=True):
        if rows is not common and rows:
            screen.add_text(kind.__doc__)
        required = [name for name, row in rows.items() if row.need]
        first = {name: rows[name] for name in [*required, *USUAL.split()] if name in rows}
        if len({row.group for row in rows.values()}) == 1:
            first = rows  # as they are declared
        table("What most runs set" if len(first) < len(rows) else "Settings", first)
        for group in kind.__mro__:
            rest = {n: row for n, row in rows.items() if row.group is group and n not in first}
            table("Only here" if group is kind else group.__doc__, rest)
    for part, (place, *others) in _parts([(kind, "") for kind in kinds]).items():
        how = "Changed" if place.endswith(".0") else "Set"  # there is no first entry to begin with
        note = f"{part.__doc__} {how} by --{place}.KEY value"
        note += f"; the same in {', '.join(others)}." if others else "."
        table(part.__name__, _rows(part), note, start=".")
    return screen.format_help()


def _rows(settings: type) -> dict[str, _Row]:
    rows = {}
    hints, texts = typing.get_type_hints(settings), _help_texts(settings)
    bases = [base for base in reversed(settings.__mro__) if dataclasses.is_dataclass(base)]
    for field in dataclasses.fields(settings):
        name, value, text = field.name, default(field), texts[field.name]
        facts, need = spell(hints[name]), ""
        if value is MISSING and not text.startswith("required"):
            text = f"required: {text}" if text else "required"
        if text.startswith("required"):
            need = name + text.partition(":")[0].removeprefix("required")
        else:
            facts += f", default {json.dumps(plain(value))}"
        group = next(b for b in bases if name in {f.name for f in dataclasses.fields(b)})
        rows[name] = _Row(f"{text} ({facts})", group, need)
    return rows


def _parts(todo: list[tuple[type, str]]) -> dict[type, dict[str, None]]:
    """Of (settings, prefix) the dataclasses inside, and where they stand; of lists the first."""
    found: dict[type, dict[str, None]] = {}
    for settings, prefix in todo:
        for name, hint in typing.get_type_hints(settings).items():
            for choice in alternatives(hint):
                is_list = typing.get_origin(choice) is list
                part = typing.get_args(choice)[0] if is_list else choice
                if dataclasses.is_dataclass(part):
                    place = f"{prefix}{name}{'.0' if is_list else ''}"
                    found.setdefault(part, {})[place] = None
                    todo.append((part, f"{place}."))
    return found


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
                own = " ".join([*above, comment.strip()]).strip()
                texts[name] = own or texts.get(name, "")
            above = []
    return texts


def options(argv: list[str]) -> list[tuple[str, str | None]]:
    """(key, value) of each `--key value` and `--key=value`; None: `--key` stands alone.

    Raises:
        InputError: a word that belongs to no key.
    """
    pairs: list[tuple[str, str | None]] = []
    for word in argv:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            pairs.append((key, value if equals else None))
        elif pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], word)
        else:
            raise InputError(f"unexpected {word!r}: options are written --key value")
    return pairs


def declared(settings: type, key: str) -> tuple[str, Any]:
    """A dotted key with _ where - was typed, and the type of its setting; None if there is none."""
    hint, names = settings, []
    for name in key.split("."):
        word = name.replace("-", "_")
        for choice in alternatives(hint):
            if dataclasses.is_dataclass(choice):
                is_field = word in {field.name for field in dataclasses.fields(choice)}
                name, hint = word, typing.get_type_hints(choice)[word] if is_field else None
                break
            if typing.get_origin(choice) in (list, dict):
                hint = typing.get_args(choice)[-1]
                name = word if hint is Any else name  # labels are data: as they are
                break
        else:
            name, hint = (word, Any) if hint is Any else (name, None)
        names.append(name)
    return ".".join(names), hint


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key inside nested dicts and lists."""
    inside: Any = values
    names = key.split(".")
    for depth, name in enumerate(names):
        here, outer = ".".join(names[: depth + 1]), ".".join(names[:depth])
        if isinstance(inside, list):
            if not name.isdecimal() or int(name) >= len(inside):
                raise InputError(f"--{key}: {here} does not exist ({len(inside)} entries, from 0)")
            name = int(name)
        elif not isinstance(inside, dict):
            raise InputError(f"--{key}: {outer} is not a setting that holds others")
        if here == key:
            inside[name] = value
        elif isinstance(inside, dict) and inside.get(name) is None:
            inside[name] = {}
        inside = inside[name]


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
