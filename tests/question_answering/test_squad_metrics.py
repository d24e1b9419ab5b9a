"""Exact match, F1 and the no-answer threshold of SQuAD's official script, on fixed cases."""

import random

import pytest

from answers import Prediction
from questions import Answer, Question
from squad_metrics import (
    best_threshold,
    exact_match,
    f1,
    normalize,
    prediction_record,
    squad_scores,
)

# prediction, right answers, exact match, F1; by hand, after evaluate-v2.0.py
CASES = [
    ("Denver Broncos", ["Denver Broncos"], 1, 1),
    ("the Denver broncos!", ["Denver Broncos"], 1, 1),
    ("Broncos", ["Denver Broncos", "The Broncos"], 1, 1),
    ("Denver", ["Denver Broncos"], 0, 2 / 3),
    ("in Denver in Colorado", ["Denver in Colorado"], 0, 6 / 7),
    ("a a b", ["a b b"], 0, 2 / 3),  # articles count for nothing: "b" and "b b"
    ("10", ["ten"], 0, 0),
    ("U.S.", ["US"], 1, 1),
    ("theory", ["ory"], 0, 0),  # an article is a whole word
    ("well-known", ["well known"], 0, 0),  # punctuation goes without leaving a blank
    ("", [], 1, 1),
    ("something", [], 0, 0),
    ("", ["something"], 0, 0),
    ("the", [], 1, 1),
    ("", ["The", "..."], 1, 1),  # nothing is left of the answers: there is none
    ("", ["The", "x"], 0, 0),
]


@pytest.mark.parametrize(("prediction", "answers", "exact", "overlap"), CASES)
def test_exact_match_and_f1(prediction, answers, exact, overlap):
    assert exact_match(prediction, answers) == exact
    assert f1(prediction, answers) == pytest.approx(overlap)


def test_normalized_text():
    assert normalize("  The  quick,\tAN (a) thé\n") == "quick thé"
    dashed = "to\u2013the\u2013point"
    assert normalize(dashed) == "to\u2013 \u2013point"  # an article leaves a blank


def official_threshold(no_answer_scores, scores, has_answer):
    """find_best_thresh of evaluate-v2.0.py, whose predictions are never empty here."""
    current = best = sum(not has for has in has_answer)
    threshold = 0.0
    for index in sorted(range(len(scores)), key=lambda index: no_answer_scores[index]):
        current += scores[index] if has_answer[index] else -1
        if current > best:
            best, threshold = current, no_answer_scores[index]
    return threshold, 100 * best / len(scores)


def test_threshold_is_that_of_the_official_script():
    draw = random.Random(0)
    improved = 0
    for _ in range(200):
        count = draw.randint(1, 12)
        has_answer = [draw.random() < 0.7 for _ in range(count)]
        scores = [draw.choice([0, 0.4, 1]) if has else 0.0 for has in has_answer]
        no_answer_scores = [draw.uniform(0, 1) for _ in range(count)]
        expected = official_threshold(no_answer_scores, scores, has_answer)
        found = best_threshold(no_answer_scores, scores, has_answer)
        assert found[1] == pytest.approx(expected[1])
        if expected[0]:  # else answering none is best, and 0 is below all scores
            assert found[0] == expected[0]
            improved += 1
        else:
            assert found[0] < min(no_answer_scores)
    assert improved > 50


def test_threshold_keeps_what_it_promises_where_scores_are_equal():
    draw = random.Random(1)
    for _ in range(100):
        count = draw.randint(1, 10)
        golds = [["yes"] if draw.random() < 0.6 else [] for _ in range(count)]
        texts = [draw.choice(["yes", "no"]) for _ in range(count)]
        no_answer_scores = [draw.choice([-1.0, 0.0, 2.0]) for _ in range(count)]
        results = squad_scores(texts, golds, no_answer_scores)
        threshold = results["best_exact_match_threshold"]
        reached = squad_scores(texts, golds, no_answer_scores, threshold)["exact_match"]
        tried = [
            squad_scores(texts, golds, no_answer_scores, t)["exact_match"] for t in (-2, -1, 0, 2)
        ]
        assert reached == pytest.approx(results["best_exact_match"]) == pytest.approx(max(tried))


def test_scores_with_and_without_an_answer():
    texts = ["in Paris", "1889", "Gustave", "a tower"]
    golds = [["Paris"], ["1889", "in 1889"], [], []]
    assert squad_scores(texts[:2], golds[:2]) == {
        "exact_match": 50.0,
        "f1": pytest.approx(100 * (2 / 3 + 1) / 2),
    }
    results = squad_scores(texts, golds, [-1.0, 3.0, 1.0, -2.0])
    assert results == {
        "exact_match": 25.0,  # of four: none for the third
        "f1": pytest.approx(100 * (2 / 3 + 1) / 4),
        "has_answer_exact_match": 0.0,
        "has_answer_f1": pytest.approx(100 / 3),
        "no_answer_exact_match": 50.0,
        "no_answer_f1": 50.0,
        "best_exact_match_threshold": -3.0,  # no answer at all, and two are right
        "best_exact_match": 50.0,
        "best_f1_threshold": -3.0,
        "best_f1": 50.0,
    }


def test_prediction_record():
    question = Question("1", "Where?", "in Paris", [Answer("Paris", 3)], "rows.jsonl, line 1")
    prediction = Prediction("in Paris", 0.5, [("in Paris", 3.0), ("Paris", 2.0)])
    record = prediction_record(question, prediction, None)
    assert (record["prediction"], record["exact_match"]) == ("in Paris", 0)
    assert record["f1"] == pytest.approx(100 * 2 / 3)
    assert record["n_best"][1] == {"text": "Paris", "score": 2.0}
    assert prediction_record(question, prediction, 0.5)["prediction"] == "in Paris"
    assert prediction_record(question, prediction, 0.4)["prediction"] == ""
