"""Answers as spans of tokens: overlapping windows over long contexts, and the best span of all.

A window is [CLS] question [SEP] a part of the context [SEP]; [CLS] stands for "no answer in here"
(Devlin et al. 2019, section 4.3).
"""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from transformers import PreTrainedTokenizerBase

from questions import Question
from utils.config import InputError
from utils.loss import IGNORE_INDEX
from utils.progress import in_batches
from utils.tables import naming_failures

Window = dict[str, Any]
MARKS = {"Mn", "Mc", "Me", "Cf"}  # Unicode's categories of accents and invisible characters


class Span(NamedTuple):
    """A part of a context, and how much the model is for it: start logit + end logit."""

    score: float
    start: int  # characters of the context before it
    end: int


class Prediction(NamedTuple):
    text: str  # the best span
    no_answer_score: float  # how much more the model is for no answer than for that
    best: list[tuple[str, float]]  # the best spans and their scores, the best one first
    losses: Sequence[float] = ()  # of the windows that hold the whole answer, or none


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError unless windows can be made with it."""
    if not tokenizer.is_fast:
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} does not tell which characters a token stands "
            "for: answers need a fast tokenizer (tokenizer.json)"
        )
    if tokenizer.cls_token_id is None:
        raise InputError("tokenizer: it has no [CLS] token, which stands for no answer")
    text = "a " * 64
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = tokenizer(
        "a",
        text,
        truncation="only_second",
        max_length=tokenizer.num_special_tokens_to_add(pair=True) + 16,
        return_overflowing_tokens=True,
    ).encodings
    if sum(window.sequence_ids.count(1) for window in windows) != tokens:
        # of a long context all but the beginning would be lost without a word
        raise InputError(
            f"tokenizers {version('tokenizers')} loses windows of a long text: "
            "install tokenizers 0.23.3 or later"
        )


@naming_failures
def make_windows(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    doc_stride: int,
    keep_offsets: bool = False,
) -> list[Window]:
    """Each question with its context in windows; one where it is short enough.

    An answer of up to doc_stride + 1 tokens stands whole in one of the windows.

    Args:
        sequence_length: tokens of a window, at most.
        doc_stride: tokens of the context that a window shares with the one before it.
        keep_offsets: for predictions: where in the context each of its tokens stands.

    Returns:
        Of each window `input_ids`, `token_type_ids`, `question` (its index), `cls` (the index of
        that token), `context` (first and last + 1 of the tokens of the context) and `start` and
        `end` (first and last token of the first answer). These are `cls` where the window does not
        hold all of it, and IGNORE_INDEX where no window does. And `offsets` (tokens of the context,
        2): its characters from and to.

    Raises:
        InputError: a question that leaves the context no room; an answer without a token.
    """
    added = tokenizer.num_special_tokens_to_add(pair=True)
    windows: list[Window] = []
    for first, batch in in_batches(questions, "questions"):
        texts = [question.text for question in batch]
        asked = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        for question, tokens in zip(batch, asked, strict=True):
            if sequence_length - added - len(tokens) <= doc_stride:
                raise InputError(
                    f"{question.place}: the question has {len(tokens)} tokens, which leaves a "
                    f"window of sequence_length {sequence_length} no more than doc_stride "
                    f"{doc_stride} tokens of the context: raise sequence_length, or lower "
                    "doc_stride"
                )
        encoded = tokenizer(
            texts,
            [question.context for question in batch],
            truncation="only_second",
            padding=False,
            max_length=sequence_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
            split_special_tokens=True,  # one that stands in a text is read as text
        )
        of_questions: list[list[Window]] = [[] for _ in batch]
        for row, number in enumerate(encoded["overflow_to_sample_mapping"]):
            in_context = [i for i, part in enumerate(encoded.sequence_ids(row)) if part == 1]
            if not in_context:
                place = batch[number].place
                raise InputError(f"{place}: the tokenizer makes no token of the context")
            begin, end = in_context[0], in_context[-1] + 1
            tokens = np.array(encoded["input_ids"][row], np.int32)
            of_questions[number].append(
                {
                    "input_ids": tokens,
                    "token_type_ids": np.array(encoded["token_type_ids"][row], np.uint8),
                    "question": first + number,
                    "table": batch[number].table,
                    "cls": int((tokens == tokenizer.cls_token_id).argmax()),
                    "context": (begin, end),
                    "offsets": np.array(encoded["offset_mapping"][row][begin:end], np.int32),
                }
            )
        for question, own in zip(batch, of_questions, strict=True):
            _label(question, own)
            for window in own:
                offsets = window.pop("offsets")
                if keep_offsets:
                    window["offsets"] = _with_marks(question.context, offsets)
            windows += own
    return windows


def _label(question: Question, windows: list[Window]) -> None:
    """Set `start` and `end` of the windows of one question."""
    if not question.answers:
        for window in windows:
            window["start"] = window["end"] = window["cls"]
        return
    answer = question.answers[0]
    text = answer.text
    # blanks around it belong to no token of its own
    start = answer.start + len(text) - len(text.lstrip())
    end = answer.start + len(text.rstrip())
    parts = [_tokens_of(window["offsets"], start, end) for window in windows]
    edges = [
        (*window["offsets"][part[[0, -1]], [0, 1]].tolist(), len(part)) if len(part) else None
        for window, part in zip(windows, parts, strict=True)
    ]
    if not any(edges):
        raise InputError(f"{question.place}: the tokenizer makes no token of {text!r}")
    # all of its tokens; characters that have none (stripped accents) are in no window
    firsts, lasts, lengths = zip(*filter(None, edges), strict=True)
    whole = (min(firsts), max(lasts), max(lengths))
    for window, part, edge in zip(windows, parts, edges, strict=True):
        window["start"] = window["end"] = window["cls"] if whole in edges else IGNORE_INDEX
        if edge == whole:
            first = window["context"][0]
            window["start"], window["end"] = (first + part[[0, -1]]).tolist()


def _tokens_of(offsets: np.ndarray, start: int, end: int) -> np.ndarray:
    """The indices of the tokens that stand for any of the characters from start to end."""
    from_, to = offsets.T
    return np.flatnonzero((to > start) & (from_ < end) & (to > from_))


def _with_marks(context: str, offsets: np.ndarray) -> np.ndarray:
    """Offsets by which an accent that the tokenizer has stripped belongs to its letter.

    So do the invisible characters between two parts of an emoji.
    """
    if context.isascii():
        return offsets
    offsets = offsets.copy()
    behind = np.append(offsets[1:, 0], len(context))
    for index in np.flatnonzero(offsets[:, 1] < behind):
        to = offsets[index, 1]
        while to < behind[index] and unicodedata.category(context[to]) in MARKS:
            to += 1
        offsets[index, 1] = to
    return offsets


def collate_windows(windows: Sequence[Window], padding: int) -> dict[str, torch.Tensor]:
    """A batch, (rows, longest window) and (rows,); without windows, one row of padding.

    `is_candidate` tells where an answer may begin and end: in the context, and at [CLS].

    Args:
        padding: the id of that token, by which some models (RoBERTa) count positions.
    """
    shape = max(1, len(windows)), max((len(w["input_ids"]) for w in windows), default=1)
    batch = {
        "input_ids": torch.full(shape, padding),
        "token_type_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "is_candidate": torch.zeros(shape, dtype=torch.bool),
        "start_positions": torch.full(shape[:1], IGNORE_INDEX),
        "end_positions": torch.full(shape[:1], IGNORE_INDEX),
    }
    batch["attention_mask"][:, 0] = 1
    for row, window in enumerate(windows):
        length = len(window["input_ids"])
        for name in ("input_ids", "token_type_ids"):
            batch[name][row, :length] = torch.from_numpy(window[name].astype(np.int64))
        batch["attention_mask"][row, :length] = 1
        batch["is_candidate"][row, slice(*window["context"])] = True
        batch["is_candidate"][row, window["cls"]] = True
        batch["start_positions"][row] = window["start"]
        batch["end_positions"][row] = window["end"]
    return batch


def best_spans(
    window: Window,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    max_answer_length: int,
    n_best: int,
) -> tuple[float, list[Span]]:
    """(score of no answer, the best spans of the context) by a window.

    Of all spans, not only those between the n_best likeliest starts and ends.

    Args:
        start_logits, end_logits: of the window's tokens, or longer by padding.
        max_answer_length: tokens.
    """
    begin, end = window["context"]
    starts, ends = (logits[begin:end].astype(np.float64) for logits in (start_logits, end_logits))
    width = min(max_answer_length, len(starts))
    padded = np.pad(ends, (0, width - 1), constant_values=-math.inf)
    scores = starts[:, None] + sliding_window_view(padded, width)
    count = min(n_best, int(np.isfinite(scores).sum()))
    flat = scores.ravel()
    order = np.argpartition(-flat, count - 1)[:count] if count else np.zeros(0, int)
    spans = []
    for place in order[np.lexsort((order, -flat[order]))]:
        first, extra = divmod(int(place), width)
        (start, _), (_, stop) = window["offsets"][first], window["offsets"][first + extra]
        spans.append(Span(float(flat[place]), int(start), int(stop)))
    cls = window["cls"]
    return float(start_logits[cls]) + float(end_logits[cls]), spans


def best_answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    found: Sequence[tuple[float, list[Span]]],
    n_best: int,
) -> list[Prediction]:
    """The best span of each question over all its windows.

    No answer weighs as much as in the window that is least for it.

    Args:
        found: of each window, what `best_spans` returns.
    """
    nulls = [math.inf] * len(questions)
    spans: list[dict[tuple[int, int], float]] = [{} for _ in questions]
    for window, (null, best) in zip(windows, found, strict=True):
        number = window["question"]
        nulls[number] = min(nulls[number], null)
        for score, *place in best:
            key = tuple(place)  # the same in two windows counts once
            spans[number][key] = max(score, spans[number].get(key, -math.inf))
    predictions = []
    for question, null, scores in zip(questions, nulls, spans, strict=True):
        best = list(_texts(question.context, scores))[:n_best]
        predictions.append(Prediction(best[0][0], null - best[0][1], best))
    return predictions


def _texts(context: str, scores: dict[tuple[int, int], float]) -> Iterator[tuple[str, float]]:
    for (start, end), score in sorted(scores.items(), key=lambda item: (-item[1], item[0])):
        yield context[start:end].strip(), score
