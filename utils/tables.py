"""Rows of labelled data: local csv, jsonl, json and parquet files, or a dataset of the Hub."""

import csv
import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, NamedTuple

import pyarrow.parquet

from utils.config import InputError

TSV = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


@dataclass
class Table:
    """Where rows are read from."""

    path: (
        str  # a file or glob (.csv, .tsv, .jsonl, .json, .parquet), or a dataset's name on the Hub
    )
    name: str | None = None  # of the Hub dataset's configuration
    split: str | None = None  # of the Hub dataset; null: train, and of train_data alone
    revision: str | None = None  # of the Hub dataset: a commit or a branch

    @property
    def is_of_the_hub(self) -> bool:
        return not self.path.endswith(FORMATS)


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
        """Raises InputError where the row has no such column."""
        if column not in self.values:
            known = ", ".join(map(str, self.values))
            raise InputError(f"{self.place}: no column {column!r}; there are: {known}")
        return self.values[column]

    def text(self, column: str) -> str:
        """Raises InputError where the column is not text, or empty."""
        value = self.get(column)
        if not isinstance(value, str):
            raise InputError(f"{self.place}: {column} must be text, not {value!r}")
        if not value.strip():
            raise InputError(f"{self.place}: {column} is empty")
        return value


def read_table(table: Table) -> list[TableRow]:
    """All rows.

    Raises:
        InputError: no such file or dataset, a broken line, or no rows at all.
    """
    if table.path.endswith(FORMATS):
        files = sorted(glob.glob(table.path))
        if not files:
            raise InputError(f"no file {table.path}")
        rows = [row for file in files for row in _read_file(file)]
    elif os.path.exists(table.path):
        kinds = ", ".join(FORMATS)
        raise InputError(f"{table.path}: give files of one of these kinds: {kinds}")
    else:
        rows = list(_read_hub(table))
    if not rows:
        raise InputError(f"{table.path} holds no rows")
    return rows


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
        raise InputError(f"cannot read {file}: {error.strerror or error}") from None
    except (UnicodeDecodeError, pyarrow.ArrowException, csv.Error) as error:
        raise InputError(f"cannot read {file}: {error}") from None


def _json_lines(file: str) -> Iterator[tuple[int, Any]]:
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise InputError(f"{file}, line {number}: not JSON: {error}") from None


def _json(file: str) -> Iterator[tuple[int, Any]]:
    with open(file, encoding="utf-8") as text:
        try:
            values = json.load(text)
        except ValueError as error:
            raise InputError(f"{file}: not JSON: {error}") from None
    if isinstance(values, dict):
        values = values.get("data")
    if not isinstance(values, list):
        raise InputError(f"{file}: expected a list of rows, or such a list under the key 'data'")
    yield from enumerate(values, 1)


def _parquet(file: str) -> Iterator[tuple[int, Any]]:
    with pyarrow.parquet.ParquetFile(file) as parquet:
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
        for values in reader:
            where = f"{file}, line {reader.line_num}"
            if None in values:
                raise InputError(f"{where}: more values than the header has columns")
            if None in values.values():
                raise InputError(f"{where}: fewer values than the header has columns")
            yield reader.line_num, values


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
            f"gives: {problem}"
        ) from None
    for number, values in enumerate(rows, 1):
        yield TableRow(values, f"{table.path} ({table.split or 'train'})", "row", number)
