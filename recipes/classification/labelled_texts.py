"""Texts with labels: what stands in the rows of tables, checked, and the labels as numbers."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from utils.config import InputError, Settings
from utils.tables import Table, TableRow, read_table


@dataclass
class LabelledTextArguments(Settings):
    """What the columns of a table hold."""

    problem_type: Literal[
        "single_label_classification", "multi_label_classification", "regression"
    ] = "single_label_classification"
    text_column: str = "text"
    text_pair_column: str | None = None  # of the second text where rows are pairs of texts
    label_column: str = "label"  # text or numbers; of several labels a list …
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
    """A row: one text or a pair, and its label (a name, several names, or a number)."""

    texts: tuple[str, ...]
    label: str | tuple[str, ...] | float
    place: str


def read_labelled_texts(
    tables: list[Table], arguments: LabelledTextArguments
) -> list[LabelledText]:
    """All rows of the tables.

    Raises:
        InputError: a missing column, an empty text, a label that is none; says where.
    """
    columns = [arguments.text_column, arguments.text_pair_column]
    return [
        LabelledText(
            tuple(row.text(column) for column in columns if column is not None),
            _label(row, arguments),
            row.place,
        )
        for table in tables
        for row in read_table(table)
    ]


def _label(row: TableRow, arguments: LabelledTextArguments) -> str | tuple[str, ...] | float:
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
    if not arguments.is_multi_label:
        return _name(value, where, arguments)
    if isinstance(value, str) and arguments.label_separator is not None:
        parts = [part.strip() for part in value.split(arguments.label_separator)]
        value = [part for part in parts if part]
    if not isinstance(value, list):
        raise InputError(
            f"{where} must be a list of labels, not {value!r}: where the labels stand in a text, "
            "set label_separator"
        )
    return tuple(dict.fromkeys(_name(part, where, arguments) for part in value))


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
        return np.array([row.label for row in rows])
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
        return np.array([ids[row.label] for row in rows])
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
