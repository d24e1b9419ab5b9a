"""The labels of a classifier that is given: kept with their names and order, or refused by name."""

import re
from typing import Any

from labelled_texts import LabelledText, LabelledTextArguments, label_names
from utils.config import InputError

NEW_HEAD = "new_head: true for a head of its own"


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
            f"problem_type, or {NEW_HEAD}"
        )
    return [config.id2label[index] for index in range(config.num_labels)]


def teacher_labels(config: Any, arguments: Any) -> list[str] | None:
    """As `given_labels`; None: it is a teacher from scratch.

    Raises:
        InputError: it is no classifier, or one for another problem_type.
    """
    path = arguments.teacher.model_name_or_path
    if path is None:
        return None
    try:
        names = given_labels(config, arguments.of_teacher())
    except InputError as error:
        raise InputError(f"teacher: {str(error).removesuffix(f', or {NEW_HEAD}')}") from None
    if names is None:
        kind = ", ".join(config.architectures or ("no architecture",))
        raise InputError(
            f"teacher: {path} has no classification head ({kind}): fine-tune it first, by "
            "finetune.py say"
        )
    return names


def check_own_labels(config: Any, arguments: Any, names: list[str]) -> None:
    """Raises InputError where the student that is given is a classifier of other labels."""
    own = given_labels(config, arguments)
    if own not in (None, names):
        raise InputError(
            f"model_name_or_path: {arguments.model_name_or_path} tells apart "
            f"{', '.join(own[:20])}, its teacher {', '.join(names[:20])}: set {NEW_HEAD}"
        )


def keep_labels(
    rows: dict[str, list[LabelledText]],
    given: list[str] | None,
    arguments: LabelledTextArguments,
    of_teacher: bool = False,
) -> tuple[dict[str, list[LabelledText]], list[str]]:
    """(the rows, their labels as the given classifier writes them; the labels by their ids).

    A table may have the labels in other capitals, or have their numbers instead.

    Args:
        given: as `given_labels` returns them.
        of_teacher: whoever is given knows all labels, of which the rows may have one alone, or
            none; where they have no names there, the rows hold their numbers.

    Raises:
        InputError: the rows have a label that is not among the given ones.
    """
    is_known = of_teacher and given is not None
    labelled = [row for row in rows["train"] if row.label is not None]
    names = (arguments.label_names or []) if is_known else label_names(labelled, arguments)
    if given is None:
        return rows, names
    has_names = not all(re.fullmatch(r"LABEL_\d+", name) for name in given)
    if arguments.problem_type == "regression":
        return rows, given if has_names else [arguments.label_column]
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
            who, remedy = ("teacher", "") if of_teacher else ("given model", f": set {NEW_HEAD}")
            raise InputError(
                f"{next(places, 'label_names')}: {name!r} is no label of the {who}, which tells "
                f"apart {', '.join(given[:20])}{remedy}"
            )
    return {split: [_renamed(row, renamed) for row in part] for split, part in rows.items()}, given


def _labels(row: LabelledText) -> tuple[str, ...]:
    return (row.label,) if isinstance(row.label, str) else row.label or ()


def _renamed(row: LabelledText, names: dict[str, str]) -> LabelledText:
    if row.label is None:
        return row
    label = tuple(names[name] for name in _labels(row))
    return row._replace(label=label[0] if isinstance(row.label, str) else label)
