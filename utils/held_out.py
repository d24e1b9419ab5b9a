"""What a model is validated and tested on: taken from the training data, and not among them."""

from collections.abc import Callable, Sequence
from textwrap import shorten
from typing import Any

from utils.arguments import FinetuningArguments
from utils.config import InputError
from utils.epochs import digest
from utils.files import warn


def hold_out(
    parts: Sequence[list], given: Callable[[Any], Any], arguments: FinetuningArguments
) -> tuple[list[list], dict[str, str]]:
    """The rows of train, validation and test data, of which `validation_split` moves a part.

    A row goes by the hash of what the model is given of it. So the same rows are held out in any
    order, with any seed, and when others are added; and rows that are alike stay together.

    Args:
        given: of a row, its texts: rows in which they are equal are the same.

    Returns:
        The parts, and for the card how many of the held-out rows stand in the training data too.

    Raises:
        InputError: nothing left on one side; with on_leaked_rows "fail" rows on both sides.
    """
    train, validation, test = parts
    share = arguments.validation_split
    if share is not None:
        is_held_out = [int(digest([given(row)]), 16) < share * 2**64 for row in train]
        pairs = [*zip(train, is_held_out, strict=True)]
        train = [row for row, is_out in pairs if not is_out]
        validation = [row for row, is_out in pairs if is_out]
        if not train or not validation:
            raise InputError(
                f"validation_split: {share} of {len(pairs)} rows, by their hashes, leaves "
                f"{len(train)} to train on and {len(validation)} to validate on: give more rows, "
                "or validation_data"
            )
    seen, found = {digest([given(row)]) for row in train}, {}
    for name, rows in {"validation": validation, "test": test}.items():
        leaked = [row for row in rows if digest([given(row)]) in seen]
        if rows:
            found[name] = f"{len(leaked):,} of {len(rows):,} {name}"
        if leaked:
            first = shorten(str(given(leaked[0])), 80)
            message = f"{found[name]} rows stand in train_data too, the first: {first}"
            if arguments.on_leaked_rows == "fail":
                raise InputError(f"on_leaked_rows: {message}")
            warn(message)
    facts = {"rows that stand in train_data too": ", ".join(found.values())} if found else {}
    return [train, validation, test], facts
