"""Questions from every format that SQuAD comes in, and what is refused."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from questions import Answer, QuestionColumns, check_unanswerable, read_questions
from utils.config import InputError
from utils.tables import Table

CONTEXT = "The Eiffel Tower stands in Paris."
ROWS = [
    {
        "id": "1",
        "title": "Tower",
        "context": CONTEXT,
        "question": " Where does it stand?",
        "answers": {"text": ["Paris", "in Paris"], "answer_start": [27, 24]},
    },
    {
        "id": "2",
        "title": "Tower",
        "context": CONTEXT,
        "question": "Who built it?",
        "answers": {"text": [], "answer_start": []},
    },
]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({**row, "answers": json.dumps(row["answers"])} for row in rows)
    else:
        asked = [
            {
                "id": row["id"],
                "question": row["question"],
                "answers": as_list(row["answers"]),
                "is_impossible": not row["answers"]["text"],
            }
            for row in rows
        ]
        paragraphs = [{"context": "Nothing is asked here.", "qas": []}]
        paragraphs.append({"context": CONTEXT, "qas": asked})
        data = [{"title": "Tower", "paragraphs": paragraphs}]
        path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return path


def as_list(answers):
    pairs = zip(answers["text"], answers["answer_start"], strict=True)
    return [{"text": text, "answer_start": start} for text, start in pairs]


def read(*paths, **columns):
    tables = [Table(str(path)) for path in paths]
    return read_questions(tables, QuestionColumns(**columns))


PLACES = {
    "jsonl": ("line 1", "line 2"),
    "parquet": ("row 1", "row 2"),
    "csv": ("line 2", "line 3"),
    "json": ("article 1, paragraph 2, question 1", "article 1, paragraph 2, question 2"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_every_format_gives_the_same_questions(kind, tmp_path):
    path = write(tmp_path / f"squad.{kind}", ROWS)
    first, second = read(path)
    assert first[:4] == (
        "1",
        "Where does it stand?",
        CONTEXT,
        [Answer("Paris", 27), Answer("in Paris", 24)],
    )
    assert first.answers[0].end == 32
    assert second[:4] == ("2", "Who built it?", CONTEXT, [])
    assert [first.place, second.place] == [f"{path}, {place}" for place in PLACES[kind]]


def test_answers_as_the_hub_library_lists_them_and_columns_by_name(tmp_path):
    rows = [
        {"key": 7, "q": row["question"], "text": CONTEXT, "spans": as_list(row["answers"])}
        for row in ROWS[:1]
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    (question,) = read(
        path,
        id_column="key",
        question_column="q",
        context_column="text",
        answers_column="spans",
    )
    assert question[:2] == ("7", "Where does it stand?")
    assert question.answer_texts == ["Paris", "in Paris"]


def row_with(**changes):
    row = {**ROWS[0], **changes}
    return {name: value for name, value in row.items() if value is not ...}


SHAPE = (
    "answers must be {text: [...], answer_start: [...]}, lists of texts and of whole numbers of "
    "one length, not "
)
REFUSED = {
    "missing column": (
        row_with(context=...),
        "no column 'context'; there are: id, title, question, answers",
    ),
    "missing id": (
        row_with(id=...),
        "no column 'id'; there are: title, context, question, answers",
    ),
    "empty question": (row_with(question=" "), "question is empty"),
    "empty context": (row_with(context=""), "context is empty"),
    "number for a text": (row_with(question=3), "question must be text, not 3"),
    "elsewhere": (
        row_with(answers={"text": ["Paris"], "answer_start": [26]}),
        "the answer 'Paris' does not stand at character 26 of context, where there is 'Pari'",
    ),
    "beyond the end": (
        row_with(answers={"text": ["Paris"], "answer_start": [400]}),
        "the answer 'Paris' does not stand at character 400 of context, where there is ''",
    ),
    "before the beginning": (
        row_with(answers={"text": ["Paris"], "answer_start": [-6]}),
        "the answer 'Paris' does not stand at character -6 of context, where there is ''",
    ),
    "no lists": (row_with(answers="Paris"), SHAPE + "Paris"),
    "another length": (
        row_with(answers={"text": ["Paris"], "answer_start": []}),
        SHAPE + "{'text': ['Paris'], 'answer_start': []}",
    ),
    "no starts": (row_with(answers={"text": ["Paris"]}), SHAPE + "{'text': ['Paris']}"),
    "a text for a number": (
        row_with(answers={"text": ["Paris"], "answer_start": ["27"]}),
        SHAPE + "{'text': ['Paris'], 'answer_start': ['27']}",
    ),
    "an empty answer": (
        row_with(answers={"text": [""], "answer_start": [0]}),
        SHAPE + "{'text': [''], 'answer_start': [0]}",
    ),
    "nothing": (row_with(answers=None), SHAPE + "None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_rows_are_named_with_their_line(name, tmp_path):
    row, message = REFUSED[name]
    path = write(tmp_path / "rows.jsonl", [ROWS[1], row])
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value) == f"{path}, line 2: {message}"


def test_an_id_that_comes_twice(tmp_path):
    one, two = (write(tmp_path / f"{name}.jsonl", ROWS) for name in ("one", "two"))
    with pytest.raises(InputError) as error:
        read(one, two)
    assert str(error.value) == f"{two}, line 1: the id '1' stands at {one}, line 1 already"


def test_a_nested_file_that_is_not_squad(tmp_path):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "x", "qas": "none"}]}]}))
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value) == (
        f"{path}, article 1, paragraph 1: qas must be a list of mappings, as SQuAD has them"
    )


def test_questions_without_an_answer_have_to_be_learned(tmp_path):
    answered, unanswerable = read(write(tmp_path / "rows.jsonl", ROWS))
    assert check_unanswerable([answered, unanswerable], [unanswerable])
    assert not check_unanswerable([answered], [answered])
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: the question has no answer, and"):
        check_unanswerable([answered], [answered, unanswerable])


@pytest.mark.parametrize("column", ["id", "question", "context"])
def test_half_of_a_character_is_refused(tmp_path, column):
    row = row_with(**{column: ROWS[0][column] + "\ud83d"})
    with pytest.raises(InputError, match=r"rows.jsonl, line 1: .*\\ud83d.*Unicode|is not Unicode"):
        read(write(tmp_path / "rows.jsonl", [row]))
