"""Rows of labelled data: local tables, JSON and text files, or a dataset of the Hub."""

import csv
import functools
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, NamedTuple

import pyarrow.parquet

from utils.config import InputError
from utils.files import READ_ERRORS, find_local_files, open_file
from utils.program import looked_for
from utils.records import (
    COMPRESSED,
    CSVS,
    TEXTS,
    SampleBy,
    Shard,
    check_columns,
    csv_rows,
    plain_text,
    records,
)

LINES, LISTS = (tuple(f".{kind}{end}" for end in COMPRESSED) for kind in ("jsonl", "json"))
KINDS = ((*CSVS, *LINES, *LISTS, ".parquet"), TEXTS)
FORMATS = sum(KINDS, ())
READABLE = ".csv, .tsv, .jsonl, .json, .txt, all of them also with .gz or .zst, or .parquet"
LONGEST_TEXT = 2**31 - 1  # bytes
ABSENT = object()  # where null may stand, too


@dataclass
class Table:
    """Where rows are read from."""

    # a file, folder or glob (.csv, .tsv, .jsonl, .json, .txt, also with .gz or .zst, or .parquet),
    # or a dataset's name on the Hub
    path: str
    name: str | None = None  # of the Hub dataset's configuration
    # as datasets has it: "train[:90%]", "train[100:200]+train[-10%:]"; files are all "train". Null:
    # train; of a Hub dataset in train_data alone
    split: str | None = None
    revision: str | None = None  # of the Hub dataset: a commit or a branch
    label: str | None = None  # in the logs; default: the path
    sample_by: SampleBy = "document"  # what of .txt is a row: the file, or as `Source` has it
    # how often an epoch of training sees a row: 2 twice, 0.25 a quarter of the rows, of which the
    # next epoch sees the next quarter
    weight: float = 1.0

    @property
    def log_name(self) -> str:
        return self.label or self.path

    @property
    def is_of_the_hub(self) -> bool:
        is_pattern = any(mark in self.path for mark in "*?[")
        return not is_pattern and not self.path.endswith(FORMATS) and not os.path.exists(self.path)


class TableRow(NamedTuple):
    """A row, and where it stands."""

    values: dict[str, Any]
    file: str
    unit: str  # "line" or "row"
    number: int
    table: str = ""  # its label

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
    if table.is_of_the_hub:
        rows = list(_read_hub(table))
    else:
        for name in ("name", "revision"):
            if getattr(table, name) is not None:
                advice = "the name in the logs is label" if name == "name" else "leave it out"
                raise InputError(f"{table.path}: {name} is for datasets of the Hub: {advice}")
        files = find_local_files(table.path, KINDS)
        for file in files:
            if not file.endswith(FORMATS) or os.path.isdir(file):
                raise InputError(f"{file}: give files of one of these kinds: {READABLE}")
        if not files:
            raise InputError(f"no file {table.path} ({READABLE}){looked_for(table.path)}")
        if table.sample_by != "document" and not any(file.endswith(TEXTS) for file in files):
            raise InputError(f"{table.path}: sample_by is for .txt: leave it out")
        rows = _slice([row for file in files for row in _read_file(file, table.sample_by)], table)
    if not rows:
        raise InputError(f"{table.path} holds no rows")
    return [row._replace(table=table.log_name) for row in rows]


def check_weights(tables: list[Table]) -> None:
    """Raises InputError where the weights make no mixture."""
    weights: dict[str, float] = {}
    for table in tables:
        if not 0 < table.weight < math.inf:
            raise InputError(
                f"weight of {table.path}: {table.weight:g} is not more than 0: leave the table out"
            )
        if weights.setdefault(table.log_name, table.weight) != table.weight:
            raise InputError(
                f"weight of {table.path}: two tables are called {table.log_name}, with "
                f"{weights[table.log_name]:g} and {table.weight:g}: give each a label"
            )


def check_held_out_tables(name: str, tables: list[Table]) -> None:
    """Raises InputError for a weight, or a dataset of the Hub without its split.

    Args:
        name: of the setting.
    """
    for table in tables:
        if table.weight != 1:
            raise InputError(
                f"{name}: weight of {table.path}: each row is measured once: weights are for "
                "train_data"
            )
        if table.is_of_the_hub and table.split is None:
            raise InputError(
                f"{name}: say which split of {table.path} it is, for example "
                f"{{path: {table.path}, split: {name.removesuffix('_data')}}}"
            )


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


def _read_file(file: str, sample_by: SampleBy) -> Iterator[TableRow]:
    reader, unit = next(found for kind, *found in READERS if file.endswith(kind))
    try:
        for number, values in reader(file, sample_by):
            if not isinstance(values, dict):
                shown = shorten(str(values), 60)
                raise InputError(f"{file}, {unit} {number}: not a mapping of columns: {shown}")
            yield TableRow(values, file, unit, number)
    except csv.Error as error:
        raise InputError(str(error)) from None
    except UnicodeDecodeError as error:
        where = "" if reader is _parquet else f", line {_first_broken_line(file)}"
        raise InputError(f"{file}{where}: not UTF-8: {error.reason}") from None
    except (*READ_ERRORS, pyarrow.ArrowException, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or shorten(str(error), 200)
        raise InputError(f"cannot read {file}: {reason}") from None


def _first_broken_line(file: str) -> int:
    with _text_of(file, "utf-8", errors="surrogateescape") as lines:
        return next(n for n, line in enumerate(lines, 1) if re.search("[\udc80-\udcff]", line))


@contextmanager
def _text_of(file: str, encoding: str, **options: Any) -> Iterator[io.TextIOWrapper]:
    with open_file(file) as stream, io.TextIOWrapper(stream, encoding, **options) as text:
        yield text


def _json_lines(file: str, _: SampleBy) -> Iterator[tuple[int, Any]]:
    with _text_of(file, "utf-8") as lines:
        for number, line in enumerate(lines, 1):
            line = line.lstrip("\ufeff")  # a byte order mark, also where files were joined
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{file}, line {number}: not JSON: {error}") from None


def _json(file: str, sample_by: SampleBy) -> Iterator[tuple[int, Any]]:
    with _text_of(file, "utf-8-sig") as text:
        try:
            values = json.load(text)
        except (json.JSONDecodeError, RecursionError) as error:
            if getattr(error, "msg", "") == "Extra data":  # JSON lines by another name
                yield from _json_lines(file, sample_by)
                return
            raise InputError(f"{file}: not JSON: {error}") from None
    if isinstance(values, dict):
        values = values.get("data")
    if not isinstance(values, list):
        raise InputError(f"{file}: expected a list of rows, or such a list under the key 'data'")
    yield from enumerate(values, 1)


def _parquet(file: str, _: SampleBy) -> Iterator[tuple[int, Any]]:
    with pyarrow.parquet.ParquetFile(file) as parquet:
        check_columns(file, parquet.schema_arrow.names)
        number = 0
        for batch in parquet.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield number, values


def _csv(file: str, _: SampleBy) -> Iterator[tuple[int, Any]]:
    with open_file(file) as stream:
        for number, values in csv_rows(stream, file):
            if isinstance(values, str):
                raise InputError(f"{file}, line {number}: {values}")
            yield number, values


def _texts(file: str, sample_by: SampleBy) -> Iterator[tuple[int, Any]]:
    found = records(Shard(file, 0, 1), (), None, LONGEST_TEXT, sample_by)
    texts = (plain_text(text, sample_by) for text, _, _ in found if text.strip())
    for number, text in enumerate(texts, 1):
        yield number, {"text": text}


READERS = (
    (CSVS, _csv, "line"),
    (LINES, _json_lines, "line"),
    (LISTS, _json, "row"),
    (".parquet", _parquet, "row"),
    (TEXTS, _texts, "text"),
)


def _read_hub(table: Table) -> Iterator[TableRow]:
    import datasets

    try:
        rows = datasets.load_dataset(
            table.path, table.name, split=table.split or "train", revision=table.revision
        )
    except Exception as error:  # of many libraries
        problem = shorten(f"{type(error).__name__}: {error}", 200)
        raise InputError(
            f"{table.path} is neither a file ({READABLE}) nor a dataset that the Hub "
            f"gives: {problem}{looked_for(table.path)}"
        ) from None
    for number, values in enumerate(rows, 1):
        yield TableRow(values, f"{table.path} ({table.split or 'train'})", "row", number)
