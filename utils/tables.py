"""Rows of labelled data: local csv, jsonl, json and parquet files, or a dataset of the Hub."""

import csv
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, NamedTuple

import pyarrow.parquet

from utils.config import InputError
from utils.files import find_local_files
from utils.program import looked_for

TSV = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
ABSENT = object()  # where null may stand, too


@dataclass
class Table:
    """Where rows are read from."""

    # a file or glob (.csv, .tsv, .jsonl, .json, .parquet), or a dataset's name on the Hub
    path: str
    name: str | None = None  # of the Hub dataset's configuration
    # as datasets has it: "train[:90%]", "train[100:200]+train[-10%:]"; files are all "train". Null:
    # train; of a Hub dataset in train_data alone
    split: str | None = None
    revision: str | None = None  # of the Hub dataset: a commit or a branch

    @property
    def is_of_the_hub(self) -> bool:
        return not self.path.endswith(FORMATS) and not os.path.exists(self.path)


class TableRow(NamedTuple):
    """A row, and where it stands."""

    values: dict[str, Any]
    file: str
    unit: str  # "line" or "row"
    number: int

    @property
    def place(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"

    def get(self, column: str) -> Any:
        """Of the column or, with dots, what is inside of one: translation.en.

        Raises:
            InputError: the row has no such column, or there is half a character in it.
        """
        value = value_at(self.values, column)
        if value is ABSENT:
            outer = column.partition(".")[0]
            names: list[Any] = []
            for name, inside in self.values.items():
                is_meant = name == outer != column and isinstance(inside, dict)
                names += [f"{outer}.{key}" for key in inside] if is_meant else [name]
            known = ", ".join(map(str, dict.fromkeys(names)))
            raise InputError(f"{self.place}: no column {column!r}; there are: {known}")
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:  # half a surrogate pair: JSON can spell it
            raise InputError(f"{self.place}: {column} is not Unicode: {value!a:.60}") from None
        return value

    def find(self, column: str) -> Any:
        """As `get`; None where the row has no such column."""
        return self.get(column) if self.has(column) else None

    def has(self, column: str) -> bool:
        return value_at(self.values, column) is not ABSENT

    def text(self, column: str) -> str:
        """Raises InputError where the column is not text, or empty."""
        value = self.get(column)
        if not isinstance(value, str):
            shown = "null" if value is None else repr(value)
            raise InputError(f"{self.place}: {column} must be text, not {shown}")
        if not value.strip():
            raise InputError(f"{self.place}: {column} is empty")
        return value


def value_at(values: Any, name: str) -> Any:
    """What stands under a name or, where it has dots, along it: ABSENT, or null, or a value.

    A key that has the dots itself comes first: {"doc.text": …} before {"doc": {"text": …}}.
    """
    if not isinstance(values, dict) or name in values:
        return values[name] if isinstance(values, dict) else ABSENT
    for dot in reversed([match.start() for match in re.finditer(r"\.", name)]):
        found = value_at(values.get(name[:dot]), name[dot + 1 :])
        if found is not ABSENT:
            return found
    return ABSENT


def read_table(table: Table) -> list[TableRow]:
    """All rows.

    Raises:
        InputError: no such file or dataset, a broken line, or no rows at all.
    """
    if table.path.endswith(FORMATS):
        for name in ("name", "revision"):
            if getattr(table, name) is not None:
                raise InputError(f"{table.path}: {name} is for datasets of the Hub: leave it out")
        files = find_local_files(table.path, FORMATS)
        if not files:
            raise InputError(f"no file {table.path}{looked_for(table.path)}")
        rows = _slice([row for file in files for row in _read_file(file)], table)
    elif os.path.exists(table.path):
        kinds = ", ".join(FORMATS)
        raise InputError(f"{table.path}: give files of one of these kinds: {kinds}")
    else:
        rows = list(_read_hub(table))
    if not rows:
        raise InputError(f"{table.path} holds no rows")
    return rows


def naming_failures(encode: Callable) -> Callable:
    """`encode(rows, …)`, which tokenizes rows, so that one on which the tokenizer fails is named.

    Its failures are bare exceptions or, where its Rust panics, no Exceptions at all.
    """

    @functools.wraps(encode)
    def encode_or_name(rows: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        try:
            return encode(rows, *arguments, **options)
        except BaseException as error:
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            if len(rows) != 1:
                for row in rows:  # one that fails alone is named
                    encode_or_name([row], *arguments, **options)
                raise
            place = getattr(rows[0], "place", None) or shorten(str(rows[0]), 60)
            raise InputError(f"{place}: the tokenizer fails on it: {error}") from None

    return encode_or_name


def _slice(rows: list[TableRow], table: Table) -> list[TableRow]:
    """The rows that `datasets.load_dataset(…, split=table.split)` gives of the files."""
    if table.split in (None, "train"):
        return rows
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(table.split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError):
        raise InputError(
            f"{table.path}: split {table.split!r}: files have the split train alone, or a slice: "
            "train[:90%], train[90%:], train[100:200]"
        ) from None
    return [row for part in parts for row in rows[part.from_ : part.to]]


def _read_file(file: str) -> Iterator[TableRow]:
    readers = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}
    reader = readers.get(os.path.splitext(file)[1], _csv)
    unit = "line" if reader in (_json_lines, _csv) else "row"
    try:
        for number, values in reader(file):
            if not isinstance(values, dict):
                shown = shorten(str(values), 60)
                raise InputError(f"{file}, {unit} {number}: not a mapping of columns: {shown}")
            yield TableRow(values, file, unit, number)
    except OSError as error:
        reason = error.strerror or shorten(str(error), 200)
        raise InputError(f"cannot read {file}: {reason}") from None
    except UnicodeDecodeError as error:
        with open(file, encoding="utf-8", errors="surrogateescape") as lines:
            broken = (n for n, line in enumerate(lines, 1) if re.search("[\udc80-\udcff]", line))
            where = "" if reader is _parquet else f", line {next(broken)}"
        raise InputError(f"{file}{where}: not UTF-8: {error.reason}") from None
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise InputError(f"cannot read {file}: {shorten(str(error), 200)}") from None


def _json_lines(file: str) -> Iterator[tuple[int, Any]]:
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            line = line.lstrip("\ufeff")  # a byte order mark, also where files were joined
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{file}, line {number}: not JSON: {error}") from None


def _json(file: str) -> Iterator[tuple[int, Any]]:
    with open(file, encoding="utf-8-sig") as text:
        try:
            values = json.load(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{file}: not JSON: {error}") from None
    if isinstance(values, dict):
        values = values.get("data")
    if not isinstance(values, list):
        raise InputError(f"{file}: expected a list of rows, or such a list under the key 'data'")
    yield from enumerate(values, 1)


def _check_header(file: str, names: Sequence[str]) -> None:
    for name in names:
        if name and names.count(name) > 1:  # a spreadsheet leaves columns without a name
            raise InputError(f"{file}: two columns are called {name!r}: name each of them once")


def _parquet(file: str) -> Iterator[tuple[int, Any]]:
    with pyarrow.parquet.ParquetFile(file) as parquet:
        _check_header(file, parquet.schema_arrow.names)
        number = 0
        for batch in parquet.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield number, values


def _csv(file: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    with open(file, encoding="utf-8-sig", newline="") as lines:
        # tab-separated values know no quotes: a cell that begins with one is text
        format_ = TSV if file.endswith(".tsv") else {"strict": True}
        reader = csv.DictReader(lines, **format_)
        line = 1
        try:
            _check_header(file, reader.fieldnames or ())
            line = reader.line_num + 1
            for values in reader:
                where = f"{file}, line {reader.line_num}"
                if None in values:
                    raise InputError(f"{where}: more values than the header has columns")
                if None in values.values():
                    raise InputError(f"{where}: fewer values than the header has columns")
                line = reader.line_num + 1
                yield reader.line_num, values
        except csv.Error as error:
            raise InputError(f"{file}, line {line}: here begins no record: {error}") from None


def _read_hub(table: Table) -> Iterator[TableRow]:
    import datasets

    try:
        rows = datasets.load_dataset(
            table.path, table.name, split=table.split or "train", revision=table.revision
        )
    except Exception as error:  # of many libraries
        problem = shorten(f"{type(error).__name__}: {error}", 200)
        raise InputError(
            f"{table.path} is neither a file ({', '.join(FORMATS)}) nor a dataset that the Hub "
            f"gives: {problem}{looked_for(table.path)}"
        ) from None
    for number, values in enumerate(rows, 1):
        yield TableRow(values, f"{table.path} ({table.split or 'train'})", "row", number)
