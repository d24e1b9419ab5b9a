"""Questions about a text, from rows as SQuAD has them on the Hub, or from its original files.

SQuAD: Rajpurkar et al. 2016; version 2, with questions that have no answer: Rajpurkar et al. 2018.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, NamedTuple

from utils.config import InputError
from utils.tables import Table, TableRow, read_table


@dataclass
class QuestionColumns:
    """Where the parts of a question stand in a row."""

    id_column: str = "id"
    question_column: str = "question"
    context_column: str = "context"
    # {text: […], answer_start: […]}, or [{text: …, answer_start: …}, …], also as JSON text; none
    # in it: the context does not answer
    answers_column: str = "answers"


class Answer(NamedTuple):
    text: str
    start: int  # characters of the context before it

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class Question(NamedTuple):
    id: str
    text: str
    context: str
    answers: list[Answer]  # all of them right; empty: the context does not answer
    place: str  # where it was read
    table: str = ""  # the same, as the logs call it

    @property
    def answer_texts(self) -> list[str]:
        return [answer.text for answer in self.answers]


def read_questions(tables: list[Table], columns: QuestionColumns) -> list[Question]:
    """All questions of the tables.

    Raises:
        InputError: a missing column, an empty text, an answer that is not where it is said to be,
            or an id for the second time; with the place of the row.
    """
    questions = []
    for table in tables:
        for row in read_table(table):
            rows = _nested(row) if "paragraphs" in row.values else [(row, columns)]
            questions += [_question(row, names) for row, names in rows]
    places: dict[str, str] = {}
    for question in questions:
        if question.id in places:
            raise InputError(
                f"{question.place}: the id {question.id!r} stands at {places[question.id]} already"
            )
        places[question.id] = question.place
    return questions


def check_unanswerable(train: list[Question], held_out: list[Question]) -> bool:
    """Whether there are questions without an answer (SQuAD 2.0).

    Raises:
        InputError: there are, but none to learn it from.
    """
    if any(not question.answers for question in train):
        return True
    for question in held_out:
        if not question.answers:
            raise InputError(
                f"{question.place}: the question has no answer, and all of train_data have one: "
                "nothing would teach the model to give none"
            )
    return False


def _nested(row: TableRow) -> Iterator[tuple[TableRow, QuestionColumns]]:
    """The questions of an article of a SQuAD file, as rows of their own."""
    for number, paragraph in enumerate(_list(row, "paragraphs"), 1):
        here = row._replace(values=paragraph, unit=f"article {row.number}, paragraph")
        here = here._replace(number=number)
        for count, values in enumerate(_list(here, "qas"), 1):
            unit = f"{here.unit} {number}, question"
            yield (
                here._replace(
                    values={**values, "context": paragraph.get("context")}, unit=unit, number=count
                ),
                QuestionColumns(),
            )


def _list(row: TableRow, key: str) -> list[dict[str, Any]]:
    values = row.get(key)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise InputError(f"{row.place}: {key} must be a list of mappings, as SQuAD has them")
    return values


def _question(row: TableRow, columns: QuestionColumns) -> Question:
    context = row.text(columns.context_column)
    answers = _answers(row, columns.answers_column)
    for text, start in answers:
        found = context[start : start + len(text)] if start >= 0 else ""
        if found != text:
            raise InputError(
                f"{row.place}: the answer {shorten(text, 60)!r} does not stand at character "
                f"{start} of {columns.context_column}, where there is {shorten(found, 60)!r}"
            )
    return Question(
        str(row.get(columns.id_column)),
        row.text(columns.question_column).strip(),
        context,
        answers,
        row.place,
        row.table,
    )


def _answers(row: TableRow, column: str) -> list[Answer]:
    given = row.get(column)
    values = given
    if isinstance(values, str):  # a cell of a csv file
        with suppress(ValueError, RecursionError):
            values = json.loads(values)
    if isinstance(values, dict) and values.keys() >= {"text", "answer_start"}:
        texts, starts = values["text"], values["answer_start"]
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            values = [
                {"text": text, "answer_start": start}
                for text, start in zip(texts, starts, strict=True)
            ]
    is_list = isinstance(values, list)
    for value in values if is_list else ():
        is_list &= (
            isinstance(value, dict)
            and isinstance(value.get("text"), str)
            and value["text"].strip() != ""
            and type(value.get("answer_start")) is int
        )
    if not is_list:
        raise InputError(
            f"{row.place}: {column} must be {{text: [...], answer_start: [...]}}, lists of texts "
            f"and of whole numbers of one length, not {shorten(str(given), 100)}"
        )
    return [Answer(value["text"], value["answer_start"]) for value in values]
