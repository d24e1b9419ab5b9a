"""The labels of a classifier that is given: kept with their names and order, or refused by name."""

import re
from typing import Any

from labelled_texts import LabelledText, LabelledTextArguments, label_names
from utils.config import InputError


def given_labels(config: Any, arguments: Any) -> list[str] | None:
    """In the order of their ids; None: no classifier is given, or its head is drawn anew.

    Args:
        arguments: `LabelledTextArguments` and `ModelArguments`, with `new_head`.

    Raises:
        InputError: it is one for another problem_type.
    """
    a, is_classifier = arguments, "ForSequenceClassification" in str(config.architectures)
    if not a.model_name_or_path or not is_classifier or a.new_head:
        return None
    kind = config.problem_type
    if kind is None and (config.num_labels == 1 or a.problem_type == "regression"):
        kind = "regression" if config.num_labels == 1 else "classification"
    if kind not in (None, a.problem_type):
        raise InputError(
            f"problem_type: {a.model_name_or_path} is for {kind}, not for {a.problem_type}: set "
            "problem_type, or new_head: true for a head of its own"
        )
    return [config.id2label[index] for index in range(config.num_labels)]


def keep_labels(
    rows: dict[str, list[LabelledText]],
    given: list[str] | None,
    arguments: LabelledTextArguments,
) -> tuple[dict[str, list[LabelledText]], list[str]]:
    """(the rows, their labels as the given classifier writes them; the labels by their ids).

    A table may have the labels in other capitals, or have their numbers instead.

    Args:
        given: as `given_labels` returns them.

    Raises:
        InputError: the rows have a label that is not among the given ones.
    """
    names = label_names(rows["train"], arguments)
    if given is None:
        return rows, names
    has_names = not all(re.fullmatch(r"LABEL_\d+", name) for name in given)
    if arguments.problem_type == "regression":
        return rows, given if has_names else names
    found = {name for split in rows.values() for row in split for name in _labels(row)}
    found |= {*(arguments.label_names or ())}
    by_number = {str(index): name for index, name in enumerate(given)}
    if found <= {*given}:
        return rows, given
    if not has_names and found <= by_number.keys():
        return rows, [*by_number]
    if not has_names and len(names) == len(given):
        return rows, names
    by_letters = {name.lower(): name for name in given} | {name: name for name in given}
    as_given = by_number if all(name.isdecimal() for name in found) else by_letters
    renamed = {name: as_given.get(name, as_given.get(name.lower(), name)) for name in found}
    for name in sorted(found):
        if renamed[name] not in given:
            places = (r.place for part in rows.values() for r in part if name in _labels(r))
            raise InputError(
                f"{next(places, 'label_names')}: {name!r} is no label of the given model, which "
                f"tells apart {', '.join(given[:20])}: set new_head: true for a head of its own"
            )
    return {split: [_renamed(row, renamed) for row in part] for split, part in rows.items()}, given


def _labels(row: LabelledText) -> tuple[str, ...]:
    return (row.label,) if isinstance(row.label, str) else row.label


def _renamed(row: LabelledText, names: dict[str, str]) -> LabelledText:
    label = tuple(names[name] for name in _labels(row))
    return row._replace(label=label[0] if isinstance(row.label, str) else label)
