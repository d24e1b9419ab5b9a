"""Which rows are held out, and which of those that are stand in the training data too."""

import random

import pytest

from utils.arguments import FinetuningArguments
from utils.config import InputError
from utils.epochs import hold_out
from utils.tables import Table

ROWS = [f"text {number}" for number in range(1000)]
TRAIN = {"train_data": [Table("train.jsonl")]}


def split(train, validation=(), test=(), **settings):
    arguments = FinetuningArguments(**TRAIN, **settings)
    arguments.check()
    return hold_out([list(train), list(validation), list(test)], lambda row: (row,), arguments)


def test_a_share_is_held_out_whatever_the_order_the_seed_and_the_other_rows():
    (train, validation, _), _ = split(ROWS, validation_split=0.1)
    assert 70 < len(validation) < 130
    assert sorted(train + validation) == sorted(ROWS)
    assert train == [row for row in ROWS if row not in set(validation)]
    mixed = [*ROWS, *(f"new {number}" for number in range(500))]
    random.Random(0).shuffle(mixed)
    (_, later, _), _ = split(mixed, validation_split=0.1, seed=5)
    assert set(validation) == set(later) & set(ROWS)
    # a larger share holds the smaller one
    assert set(validation) < set(split(ROWS, validation_split=0.3)[0][1])


def test_rows_that_are_alike_stay_together():
    (train, validation, _), facts = split(3 * ROWS, validation_split=0.2)
    assert not set(train) & set(validation)
    assert len(validation) == 3 * len(set(validation))
    assert facts == {"rows that stand in train_data too": f"0 of {len(validation):,} validation"}


def test_rows_on_both_sides_are_counted_or_refused(capsys):
    parts = ROWS, [ROWS[3], "new", ROWS[3]], ["other"]
    found, facts = split(*parts)
    assert found == [*map(list, parts)]
    assert facts == {"rows that stand in train_data too": "2 of 3 validation, 0 of 1 test"}
    assert capsys.readouterr().err == (
        "warning: 2 of 3 validation rows stand in train_data too, the first: ('text 3',)\n"
    )
    with pytest.raises(InputError, match=r"^on_leaked_rows: 2 of 3 validation rows stand in"):
        split(*parts, on_leaked_rows="fail")
    assert split(ROWS, on_leaked_rows="fail")[1] == {}


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_a_share_that_leaves_nothing(share):
    with pytest.raises(
        InputError, match=r"of 3 rows, by their hashes, leaves [03] to train on and"
    ):
        split(ROWS[:3], validation_split=share)


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match="there is validation_data too: keep one of them"):
        split(ROWS, validation_split=0.1, validation_data=[Table("validation.jsonl")])
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(InputError, match=r"validation_split must be in \(0, 1\), not"):
            split(ROWS, validation_split=share)
    FinetuningArguments(**TRAIN, validation_split=0.1, early_stopping_patience=2).check()
