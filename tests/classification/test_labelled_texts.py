"""What stands in a cell of labels, and which labels it means."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from labelled_texts import LabelledTextArguments, label_ids, label_names, read_labelled_texts
from utils.config import InputError
from utils.tables import Table

NAMES = ["art", "news", "sport"]
LABELS = [["art", "news"], ["news"], [], ["art", "sport"], ["art", "news", "sport"]]
VECTORS = [[int(name in labels) for name in NAMES] for labels in LABELS]
TEXTS = [f"text {number}" for number in range(len(LABELS))]
MULTI = {"problem_type": "multi_label_classification"}


def write(path, cells):
    """Rows of a text and a cell of labels."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *zip(TEXTS, cells, strict=False)])
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "label": cells}), path)
    else:
        rows = [{"text": t, "label": c} for t, c in zip(TEXTS, cells, strict=False)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, more=None, **settings):
    arguments = LabelledTextArguments(**{**MULTI, **settings})
    arguments.check()
    tables = {"train": [Table(str(path))]}
    tables |= {"test": [Table(str(more))]} if more else {}
    return read_labelled_texts(tables, arguments), arguments


def read_vectors(path, **settings):
    """(names, the matrix that is learned)."""
    rows, arguments = read(path, **settings)
    names = label_names(rows["train"], arguments)
    return names, label_ids(rows["train"], names, arguments).tolist()


SPELLINGS = {
    "Python": str,
    "JSON": json.dumps,
    "bare": lambda labels: f"[{', '.join(labels)}]",
    "a tuple": lambda labels: str(tuple(labels)),
    "a set": lambda labels: str(set(labels)) if labels else "[]",
}


@pytest.mark.parametrize("separator", [None, ",", ";"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_list_in_a_cell_holds_the_labels_that_are_meant(tmp_path, spelling, separator):
    path = write(tmp_path / "a.csv", map(SPELLINGS[spelling], LABELS))
    assert read_vectors(path, label_separator=separator) == (NAMES, VECTORS)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_lists_of_names(tmp_path, suffix):
    assert read_vectors(write(tmp_path / f"a.{suffix}", LABELS)) == (NAMES, VECTORS)


def numpy_like(vector):
    return f"[{' '.join(map(str, vector))}]"


@pytest.mark.parametrize("names", [None, NAMES])
@pytest.mark.parametrize(
    ("suffix", "spell"),
    [
        ("csv", str),
        ("csv", numpy_like),
        ("csv", lambda vector: numpy_like(f"{x}." for x in vector)),
        ("csv", lambda vector: str([bool(x) for x in vector])),
        ("csv", lambda vector: json.dumps([bool(x) for x in vector])),
        ("jsonl", list),
        ("jsonl", lambda vector: [float(x) for x in vector]),
        ("jsonl", lambda vector: [bool(x) for x in vector]),
        ("jsonl", lambda vector: [str(x) for x in vector]),
        ("parquet", lambda vector: [float(x) for x in vector]),
        ("parquet", lambda vector: [bool(x) for x in vector]),
    ],
)
def test_a_vector_has_a_place_for_each_label(tmp_path, suffix, spell, names):
    path = write(tmp_path / f"a.{suffix}", [*map(spell, VECTORS)])
    assert read_vectors(path, label_names=names) == (names or ["0", "1", "2"], VECTORS)


def test_a_vector_in_a_cell_with_a_separator(tmp_path):
    path = write(tmp_path / "a.csv", [" ".join(map(str, vector)) for vector in VECTORS])
    assert read_vectors(path, label_separator=" ", label_names=NAMES) == (NAMES, VECTORS)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_lists_of_numbers_are_numbers_of_labels(tmp_path, suffix):
    numbers = [[NAMES.index(name) for name in labels] for labels in LABELS]
    path = write(tmp_path / f"a.{suffix}", map(str, numbers) if suffix == "csv" else numbers)
    assert read_vectors(path, label_names=NAMES) == (NAMES, VECTORS)
    # with two labels as well: no list holds a number twice, and their lengths differ
    path = write(tmp_path / "b.jsonl", [[0], [1], [0, 1], [], [1, 0]])
    assert read_vectors(path, label_names=["no", "yes"])[1] == [
        [1, 0],
        [0, 1],
        [1, 1],
        [0, 0],
        [1, 1],
    ]


def test_two_labels_as_vectors(tmp_path):
    cells = [[0, 1], [1, 0], [0, 1]]
    path = write(tmp_path / "a.jsonl", cells)
    assert read_vectors(path, label_names=["no", "yes"]) == (["no", "yes"], cells)


def test_the_training_data_decide_what_a_list_of_zeros_and_ones_means(tmp_path):
    vectors = write(tmp_path / "vectors.jsonl", VECTORS)
    numbers = write(tmp_path / "numbers.jsonl", [[2, 1], [0, 1], [2]])
    few = write(tmp_path / "few.jsonl", [[0, 1]])
    rows, _ = read(numbers, few, label_names=NAMES)
    assert rows["test"][0].label == ("art", "news")
    with pytest.raises(InputError, match=r"few.jsonl, line 1: label must be a list of 3 zeros and"):
        read(vectors, few)
    with pytest.raises(InputError, match=r"numbers.jsonl, line 1: label must be a list of 3 zeros"):
        read(vectors, numbers, label_names=NAMES)


@pytest.mark.parametrize(
    ("suffix", "cells", "settings", "message"),
    [
        ("jsonl", [[1, 1, 0], [0, 1]], {}, "line 1: label is neither a list of labels nor, in all"),
        ("jsonl", [[True, False], [True]], {}, "line 1: label is neither a list of labels nor"),
        ("jsonl", [[0, 1], [1, 1]], {"label_names": NAMES}, "holds lists of 2 zeros and ones, and"),
        (
            "jsonl",
            [[0.5, 0.5], [1, 0]],
            {},
            "line 1: label must be text or a whole number, not 0.5",
        ),
        ("jsonl", [["art"], [["news"]]], {}, "line 2: label must be text or a whole number, not ["),
        ("csv", ["['art' 'news']"], {}, "line 2: label: \"['art' 'news']\" is no list of labels"),
        (
            "csv",
            ["['art', 'it's']"],
            {"label_separator": ","},
            "is no list of labels: write commas",
        ),
        (
            "csv",
            ["[art news]"],
            {},
            "line 2: label: '[art news]' is no list of labels: write commas",
        ),
        ("csv", ["art, news"], {}, "where the labels stand in a text, set label_separator"),
    ],
)
def test_what_is_ambiguous_is_refused(tmp_path, suffix, cells, settings, message):
    with pytest.raises(InputError) as error:
        read(write(tmp_path / f"a.{suffix}", cells), **settings)
    assert message in str(error.value)


def test_brackets_in_names_of_labels(tmp_path):
    path = write(tmp_path / "a.csv", ["[a]|[b]", "(a) or b|c", "[a] x, y", "{z}"])
    rows, _ = read(path, label_separator="|")
    assert [row.label for row in rows["train"]] == [
        ("[a]", "[b]"),
        ("(a) or b", "c"),
        ("[a] x, y",),
        ("{z}",),
    ]


def test_a_list_is_not_one_label(tmp_path):
    path = write(tmp_path / "a.csv", ["['art', 'news']", "['news']"])
    single = "single_label_classification"
    with pytest.raises(InputError) as error:
        read(path, problem_type=single)
    assert str(error.value).endswith(
        "is a list of labels: set problem_type: " + MULTI["problem_type"]
    )
    path = write(tmp_path / "b.csv", ["[CLS]", "[MASK]", "(a, b)"])
    rows, _ = read(path, problem_type=single)
    assert [row.label for row in rows["train"]] == ["[CLS]", "[MASK]", "(a, b)"]
