"""Texts with labels: what stands in the rows of tables, checked, and the labels as numbers."""

import ast
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from utils.config import InputError, Settings
from utils.program import say
from utils.tables import Table, TableRow, read_table


@dataclass
class LabelledTextArguments(Settings):
    """What the columns of a table hold."""

    problem_type: Literal[
        "single_label_classification", "multi_label_classification", "regression"
    ] = "single_label_classification"
    text_column: str | None = None  # null: text, or else the only one that has no other use
    text_pair_column: str | None = None  # of the second text where rows are pairs of texts
    # text or numbers; of several labels a list of them, a list of 0 and 1 for each, a text of such
    label_column: str = "label"
    label_separator: str | None = None  # … or text in which this stands between two labels
    label_names: list[str] | None = None  # of the labels 0, 1, … where the table has numbers

    def check(self) -> None:
        if self.label_separator is not None and not self.is_multi_label:
            raise InputError("label_separator: needs problem_type: multi_label_classification")
        if self.label_separator == "":
            raise InputError("label_separator must not be empty")
        if self.label_names is not None:
            if self.problem_type == "regression":
                raise InputError("label_names: a regression has none")
            if len(set(self.label_names)) < max(2, len(self.label_names)):
                raise InputError("label_names: give two names at least, none of them twice")
        super().check()

    @property
    def is_multi_label(self) -> bool:
        return self.problem_type == "multi_label_classification"


class LabelledText(NamedTuple):
    """A row: one text or a pair, and its label (a name, several names, or a number), if any."""

    texts: tuple[str, ...]
    label: str | tuple[str, ...] | float | None
    place: str
    table: str = ""  # where it was read, as the logs call it


def read_labelled_texts(
    tables: dict[str, list[Table]],
    arguments: LabelledTextArguments,
    lacks_label: Callable[[str, TableRow], bool] | None = None,
) -> dict[str, list[LabelledText]]:
    """All rows of the tables, by split; those of "train" decide what a list of 0 and 1 means.

    Args:
        lacks_label: (split, row) → whether the label is None, whatever stands there; null: all
            rows have one.

    Raises:
        InputError: a missing column, an empty text, a label that is none; says where.
    """
    columns, found, size = None, {}, None
    for split, of_split in tables.items():
        rows = [row for table in of_split for row in read_table(table)]
        labels = [
            None if lacks_label and lacks_label(split, row) else _label(row, arguments)
            for row in rows
        ]
        if arguments.is_multi_label:
            if split == "train":
                size = _vector_size([x for x in labels if x is not None], arguments)
            labels = [
                None if parts is None else _names_of(parts, row.place, size, arguments)
                for row, parts in zip(rows, labels, strict=True)
            ]
        if columns is None and rows:
            columns = [_text_column(rows[0], arguments), arguments.text_pair_column]
        found[split] = [
            LabelledText(
                tuple(row.text(column) for column in columns if column is not None),
                label,
                row.place,
                row.table,
            )
            for row, label in zip(rows, labels, strict=True)
        ]
    return found


def _text_column(row: TableRow, arguments: LabelledTextArguments) -> str:
    a = arguments
    if a.text_column is not None or row.has("text"):
        return a.text_column or "text"
    others = [name for name in row.values if name not in (a.label_column, a.text_pair_column)]
    if len(others) != 1:
        known = ", ".join(map(repr, row.values))
        raise InputError(f"{row.place}: text_column: which holds the texts? there are: {known}")
    say(f"{row.file}: the texts are taken from its column {others[0]!r}")
    return others[0]


def _label(row: TableRow, arguments: LabelledTextArguments) -> Any:
    """A number, a name or, of several labels, the list that stands there."""
    column = arguments.label_column
    value = row.get(column)
    where = f"{row.place}: {column}"
    if arguments.problem_type == "regression":
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"{where} must be a number, not {value!r}")
        return number
    values = list_in_cell(value, where) if isinstance(value, str) else value
    if not arguments.is_multi_label:
        if isinstance(value, str) and values and len(values) > 1:
            raise InputError(
                f"{where} {value!r} is a list of labels: set problem_type: "
                "multi_label_classification"
            )
        return _name(value, where, arguments)
    if values is None and isinstance(value, str) and arguments.label_separator is not None:
        parts = [part.strip() for part in value.split(arguments.label_separator)]
        values = [part for part in parts if part]
    if not isinstance(values, list):
        raise InputError(
            f"{where} must be a list of labels, not {value!r}: where the labels stand in a text, "
            "set label_separator"
        )
    return values


def list_in_cell(text: str, where: str) -> list | None:
    """The list that a cell of a csv file holds, as Python, JSON, numpy or people write one.

    Raises:
        InputError: it begins as a list of texts and is none.
    """
    text = text.strip()
    if text[:1] + text[-1:] not in ("[]", "()", "{}"):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            values = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        # Python takes ['a' 'b'], which numpy writes, for one text
        if isinstance(values, list | tuple | set) and not re.search(r"""['"]\s+['"]""", text):
            return list(values)
    inside = text[1:-1].strip()
    if re.fullmatch(r"\d+\.?(\s+\d+\.?)*", inside) and text.startswith("["):
        return [float(number) for number in inside.split()]  # as numpy prints them
    is_bare = text.startswith("[") and not re.search(r"""[][(){}'"]""", inside)
    if inside.startswith(("'", '"')) or (is_bare and "," not in inside and " " in inside):
        raise InputError(f"{where}: {text!r} is no list of labels: write commas between them")
    return [part.strip() for part in inside.split(",")] if is_bare else None


def _vector_size(labels: list[list], arguments: LabelledTextArguments) -> int | None:
    """How long the vectors are, if all lists are vectors of 0 and 1: a place for each label.

    Lists of the labels' numbers are not: they hold no number twice and, where all have the same
    two, teach nothing.

    Raises:
        InputError: not one for each of label_names.
    """
    sizes = {len(label) for label in labels}
    is_vector = len(sizes) == 1 and min(sizes) > 1 and all(map(_is_vector, labels))
    names = arguments.label_names
    if is_vector and names is not None and len(names) not in sizes:
        raise InputError(
            f"train_data: {arguments.label_column} holds lists of {min(sizes)} zeros and ones, and "
            f"label_names has {len(names)} names: give a 0 or 1 for each, or lists of numbers"
        )
    return min(sizes) if is_vector else None


def _is_vector(values: list) -> bool:
    return all(value in (0, 1, "0", "1") for value in values)


def _names_of(
    values: list, place: str, size: int | None, arguments: LabelledTextArguments
) -> tuple[str, ...]:
    where = f"{place}: {arguments.label_column}"
    if size is not None:
        if len(values) != size or not _is_vector(values):
            raise InputError(
                f"{where} must be a list of {size} zeros and ones, as in train_data, not {values!r}"
            )
        return tuple(
            _name(index, where, arguments) for index, value in enumerate(values) if int(value)
        )
    names = tuple(_name(value, where, arguments) for value in values)
    are_numbers = all(str(value).isdecimal() for value in values)
    if any(isinstance(value, bool) for value in values) or (
        are_numbers and len(set(names)) < len(names)
    ):
        raise InputError(
            f"{where} is neither a list of labels nor, in all rows of train_data, one of a 0 or 1 "
            f"for each: {values!r}"
        )
    return tuple(dict.fromkeys(names))


def _name(value: Any, where: str, arguments: LabelledTextArguments) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers with gaps
    if not isinstance(value, str | int) or not str(value).strip():
        raise InputError(f"{where} must be text or a whole number, not {value!r}")
    names = arguments.label_names
    if names is None:
        return str(value)
    if not str(value).isdecimal() or int(value) >= len(names):
        raise InputError(
            f"{where} must be a number from 0 to {len(names) - 1}, one for each of label_names, "
            f"not {value!r}"
        )
    return names[int(value)]


def label_names(rows: list[LabelledText], arguments: LabelledTextArguments) -> list[str]:
    """The labels in the order of their ids; of a regression the name of its column.

    Raises:
        InputError: the rows do not differ: there is nothing to learn.
    """
    if len({row.label for row in rows}) < 2:
        raise InputError(
            f"train_data: {arguments.label_column} is {rows[0].label!r} in every row: there is "
            "nothing to tell apart"
        )
    if arguments.problem_type == "regression":
        return [arguments.label_column]
    if arguments.label_names is not None:
        return arguments.label_names
    names = {name for row in rows for name in _names(row)}
    are_numbers = all(name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if are_numbers else 0, name))


def label_ids(
    rows: list[LabelledText], names: list[str], arguments: LabelledTextArguments
) -> np.ndarray:
    """The labels as a model learns them.

    Returns:
        (rows,): ids, int64, or numbers, float64; of several labels (rows, labels), 0 or 1, int64.

    Raises:
        InputError: a label that is not among the names; says where.
    """
    if arguments.problem_type == "regression":
        return np.array([row.label for row in rows], np.float64)
    ids = {name: index for index, name in enumerate(names)}
    for row in rows:
        for name in _names(row):
            if name not in ids:
                known = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
                raise InputError(
                    f"{row.place}: {arguments.label_column} {name!r} does not occur in train_data, "
                    f"whose labels are: {known}"
                )
    if not arguments.is_multi_label:
        return np.array([ids[row.label] for row in rows], np.int64)
    found = np.zeros((len(rows), len(names)), np.int64)
    for index, row in enumerate(rows):
        found[index, [ids[name] for name in row.label]] = 1
    return found


def _names(row: LabelledText) -> tuple[str, ...]:
    return (row.label,) if isinstance(row.label, str) else row.label


def class_weights(names: list[str], labels: np.ndarray, arguments: Any) -> list[float] | None:
    """A weight for each label, 1 where `class_weights` leaves it out.

    "balanced": rows / (labels x rows of the label), as scikit-learn has it, and with several labels
    the negative over the positive rows of each.

    Args:
        labels: those of the training rows, as `label_ids` returns them.

    Raises:
        InputError: a label that does not exist, or one without rows to be balanced.
    """
    given = arguments.class_weights
    if given is None:
        return None
    if given == "balanced":
        counts = (
            labels.sum(0) if arguments.is_multi_label else np.bincount(labels, None, len(names))
        )
        if not counts.all():
            empty = names[int(counts.argmin())]
            raise InputError(f"class_weights: balanced, but no training row has the label {empty}")
        if arguments.is_multi_label:
            return ((len(labels) - counts).clip(1) / counts).tolist()
        return (len(labels) / (len(names) * counts)).tolist()
    weights = {str(name): weight for name, weight in given.items()}
    if unknown := weights.keys() - set(names):
        raise InputError(
            f"class_weights: there is no label {min(unknown)!r}; there are: {', '.join(names)}"
        )
    return [weights.get(name, 1.0) for name in names]
