"""Exact match and F1 as SQuAD's evaluate-v2.0.py has them, with questions that have no answer.

Version 1's script differs in one point: where nothing is left of a text once it is normalised
("The"), its F1 is 0; here, as in version 2, such a text is no answer.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

from answers import Prediction
from questions import Question

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """In small letters, without punctuation and articles, one blank between words."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers, normalised; "" is right where there is none."""
    return float(normalize(prediction) in _normalized(answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Of the words of the prediction and of the answer that is nearest to it, in [0, 1]."""
    words = normalize(prediction).split()
    return max(_f1(words, answer.split()) for answer in _normalized(answers))


def _normalized(answers: Sequence[str]) -> list[str]:
    return [text for text in map(normalize, answers) if text] or [""]


def _f1(words: list[str], answer: list[str]) -> float:
    if not words or not answer:
        return float(words == answer)
    shared = (Counter(words) & Counter(answer)).total()
    return 2 * shared / (len(words) + len(answer))


def best_threshold(
    no_answer_scores: Sequence[float], scores: Sequence[float], has_answer: Sequence[bool]
) -> tuple[float, float]:
    """The threshold above which to say that there is no answer, and the mean score with it.

    Args:
        no_answer_scores: of each question; the larger, the likelier that it has no answer.
        scores: of each question's best span, in [0, 1].
        has_answer: of each question.

    Returns:
        (threshold, score in percent): a question with a score above the threshold is left without
        an answer. The smallest threshold among the best ones; all are left without an answer at
        one below all scores.
    """
    order = sorted(range(len(scores)), key=lambda index: no_answer_scores[index])
    total = len(scores) - sum(has_answer)  # no answer to any question
    best, threshold = total, no_answer_scores[order[0]] - 1.0
    for place, index in enumerate(order):
        total += scores[index] - (not has_answer[index])
        following = order[place + 1] if place + 1 < len(order) else None
        # questions of one score are answered all or none
        is_cut = following is None or no_answer_scores[following] > no_answer_scores[index]
        if is_cut and total > best:
            best, threshold = total, no_answer_scores[index]
    return threshold, 100 * best / len(scores)


def squad_scores(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    no_answer_scores: Sequence[float] | None = None,
    threshold: float = 0.0,
) -> dict[str, float]:
    """Exact match and F1 in percent, over all questions.

    Args:
        predictions: the best span of each question.
        answers: the right ones of each question; none: it has no answer.
        no_answer_scores: of each question, where some may have no answer: a prediction whose score
            is above the threshold is replaced by none. The scores are then also given of the
            questions with and without an answer, and with the thresholds that are best for them.
    """
    golds = [[text for text in texts if normalize(text)] for texts in answers]
    spans = {
        "exact_match": [exact_match(p, g) for p, g in zip(predictions, golds, strict=True)],
        "f1": [f1(p, g) for p, g in zip(predictions, golds, strict=True)],
    }
    if no_answer_scores is None:
        return {name: _percent(values) for name, values in spans.items()}
    has_answer = [bool(texts) for texts in golds]
    is_answered = [score <= threshold for score in no_answer_scores]
    results: dict[str, float] = {}
    for name, values in spans.items():
        kept = [
            value if answered else float(not has)
            for value, answered, has in zip(values, is_answered, has_answer, strict=True)
        ]
        results[name] = _percent(kept)
        for group, wanted in (("has_answer", True), ("no_answer", False)):
            members = [v for v, has in zip(kept, has_answer, strict=True) if has is wanted]
            if members:
                results[f"{group}_{name}"] = _percent(members)
    for name, values in spans.items():
        best = best_threshold(no_answer_scores, values, has_answer)
        results[f"best_{name}_threshold"], results[f"best_{name}"] = best
    return results


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def results_of(
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    threshold: float | None,
) -> dict[str, float]:
    """What is logged of an evaluation: the mean loss over the windows with a target, and scores.

    Without a threshold every question is answered.
    """
    losses = [*chain(*(prediction.losses for prediction in predictions))]
    results = squad_scores(
        [prediction.text for prediction in predictions],
        [question.answer_texts for question in questions],
        None if threshold is None else [p.no_answer_score for p in predictions],
        threshold or 0.0,
    )
    loss = {"eval_loss": math.fsum(losses) / max(1, len(losses))}
    return loss | {f"eval_{name}": value for name, value in results.items()}


def prediction_record(
    question: Question, prediction: Prediction, threshold: float | None
) -> dict[str, Any]:
    """A line of predictions.jsonl: its loss is the mean over so many windows, or of none null."""
    losses = prediction.losses
    has_none = threshold is not None and prediction.no_answer_score > threshold
    text, answers = "" if has_none else prediction.text, question.answer_texts
    return {
        "row": question.place,
        "id": question.id,
        "question": question.text,
        "prediction": text,
        "answers": answers,
        "exact_match": 100 * exact_match(text, answers),
        "f1": 100 * f1(text, answers),
        "loss": math.fsum(losses) / len(losses) if losses else None,
        "windows": len(losses),
        "no_answer_score": prediction.no_answer_score,
        "n_best": [{"text": text, "score": score} for text, score in prediction.best],
    }
