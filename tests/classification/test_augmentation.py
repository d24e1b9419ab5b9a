"""Training texts varied: by what, how much, and as a function of (seed, epoch, row) alone."""

from collections import Counter

import pytest

from augmentation import Augmentation, Augmenter
from labelled_texts import LabelledText
from utils.config import InputError

ROWS = [
    LabelledText((f"{label}{number}. " + " ".join(f"{label}{i}" for i in range(19)),), label, "")
    for number in range(20)
    for label in "ab"
]


def augmenter(*operations: str, rows: list[LabelledText] = ROWS, seed: int = 0, **settings):
    settings = {"probability": 1.0, **settings}
    return Augmenter(rows, Augmentation(operations=list(operations), **settings), seed)


def words(texts: tuple[str, ...]) -> list[str]:
    return texts[0].split()


def changed(row: LabelledText, texts: tuple[str, ...]) -> int:
    return sum(one != other for one, other in zip(words(row.texts), words(texts), strict=True))


@pytest.mark.parametrize(("operation", "least", "most"), [("replacement", 1, 4), ("swap", 1, 8)])
def test_a_share_of_the_words_changes(operation: str, least: int, most: int):
    vary = augmenter(operation, word_share=0.2)
    counts = [changed(row, vary(index, 0)) for index, row in enumerate(ROWS)]
    assert most == max(counts) or operation == "swap"
    assert sum(count < least for count in counts) <= 2  # a word may replace itself
    assert max(counts) <= most
    if operation == "swap":
        for index, row in enumerate(ROWS):
            assert Counter(words(vary(index, 0))) == Counter(words(row.texts))


def test_deletion_and_insertion_change_the_number_of_words():
    for index, row in enumerate(ROWS):
        fewer = words(augmenter("deletion", word_share=0.2)(index, 0))
        assert len(fewer) == 16
        assert not Counter(fewer) - Counter(words(row.texts))
        more = words(augmenter("insertion", word_share=0.2)(index, 0))
        assert len(more) == 24
        assert not Counter(words(row.texts)) - Counter(more)
        known = {word for other in ROWS for word in words(other.texts)}
        assert set(more) <= known


def test_concatenation_appends_a_text_of_the_same_label():
    vary = augmenter("concatenation")
    texts = {
        row.label: {other.texts[0] for other in ROWS if other.label == row.label} for row in ROWS
    }
    for index, row in enumerate(ROWS):
        own, appended = vary(index, 0)[0].split("\n")
        assert own == row.texts[0]
        assert appended in texts[row.label]


def test_splitting_takes_sentences_and_halves_of_a_single_one():
    rows = [
        LabelledText(("One is here. Two is there. Three.",), "a", ""),
        LabelledText(("one two three four",), "b", ""),
        LabelledText(("one",), "b", ""),
    ]
    vary = augmenter("splitting", rows=rows)
    found = [{vary(index, epoch)[0] for epoch in range(40)} for index in range(3)]
    assert found[0] == {
        "One is here.",
        "One is here. Two is there.",
        "Two is there. Three.",
        "Three.",
    }
    assert found[1] == {"one two", "three four"}
    assert found[2] == {"one"}


def test_no_text_becomes_empty_and_both_of_a_pair_are_varied():
    rows = [
        LabelledText(("one", "two three\n  four"), "a", ""),
        LabelledText(("x", "y z"), "b", ""),
    ]
    for operation in ("replacement", "swap", "deletion", "insertion", "splitting"):
        vary = augmenter(operation, rows=rows, word_share=1.0)
        seen = [vary(0, epoch) for epoch in range(20)]
        assert all(text.strip() for texts in seen for text in texts)
        assert {len(texts) for texts in seen} == {2}
        assert any(texts[1] != rows[0].texts[1] for texts in seen)


def test_lines_stay_where_no_word_is_deleted():
    rows = [LabelledText(("one\n    two\n\nthree",), "a", ""), LabelledText(("x",), "b", "")]
    text = augmenter("swap", rows=rows, word_share=1.0)(0, 0)[0]
    assert [line.count(" ") for line in text.split("\n")] == [0, 4, 0, 0]


def test_the_texts_are_a_function_of_seed_epoch_and_row():
    operations = ("replacement", "swap", "deletion", "insertion", "concatenation", "splitting")
    one, other = augmenter(*operations), augmenter(*operations)
    everything = [one(index, 1) for index in range(len(ROWS))]
    assert everything == [other(index, 1) for index in reversed(range(len(ROWS)))][::-1]
    assert everything != [one(index, 2) for index in range(len(ROWS))]
    assert everything != [augmenter(*operations, seed=1)(i, 1) for i in range(len(ROWS))]


def test_probability_is_the_share_of_texts_that_are_varied():
    vary = augmenter("insertion", probability=0.25)
    varied = sum(vary(i, e) != ROWS[i].texts for i in range(len(ROWS)) for e in range(50))
    assert varied / (50 * len(ROWS)) == pytest.approx(0.25, abs=0.03)
    never = augmenter("insertion", probability=0.0)
    assert all(never(index, 0) == row.texts for index, row in enumerate(ROWS))


@pytest.mark.parametrize(
    ("settings", "problem", "are_pairs", "message"),
    [
        ({"operations": []}, "regression", False, "operations: give at least one"),
        ({"probability": 1.5}, "regression", False, r"probability must be in \[0, 1\], not 1.5"),
        ({"operations": ["concatenation"]}, "regression", False, "none in a regression"),
        (
            {"operations": ["concatenation"]},
            "single_label_classification",
            True,
            "pairs of texts cannot be joined",
        ),
    ],
)
def test_settings_that_make_no_sense(settings: dict, problem: str, are_pairs: bool, message: str):
    with pytest.raises(InputError, match=message):
        Augmentation(**settings).check(problem, are_pairs)
