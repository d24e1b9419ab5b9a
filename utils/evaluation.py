"""Loss and bits per byte on held-out documents, by domain, over all ranks."""

import gzip
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from utils.config import InputError
from utils.packing import IGNORE_INDEX, Piece, pack
from utils.ranks import Ranks
from utils.sources import Document
from utils.stream import collate


def evaluate_by_domain(
    ranks: Ranks,
    documents: Iterator[Document],
    encode: Callable[[list[str]], list[np.ndarray]],
    token_losses: Callable[..., torch.Tensor],
    sequence_length: int,
    batch_size: int,
) -> dict[str, Any] | None:
    """Mean loss over the target tokens, and bits per byte of the text, in all and by domain.

    A document is scored from its begin to its end token; one that is longer than sequence_length
    in pieces of that length, which do not see each other. So the numbers depend neither on the
    other documents nor on the number of ranks; the bits per byte are those of a code for whole
    documents. Every rank takes every world_size-th document; sums are in float64.

    Args:
        token_losses: batch → losses of shape (rows, sequence_length); every rank calls it as often.

    Returns:
        None when a stop signal came in between.
    """
    sums: dict[str, list[float]] = {}  # domain → [loss, target tokens, bytes]
    mine = itertools.islice(documents, ranks.rank, None, ranks.world_size)

    def encoded() -> Iterator[tuple[np.ndarray, str]]:
        for document in mine:
            (tokens,) = encode([document.text])
            domain = sums.setdefault(document.domain, [0.0, 0, 0])
            domain[2] += len(document.text.encode())
            yield tokens, document.domain

    for tensors, contents in batches(ranks, _rows(encoded(), sequence_length), batch_size):
        losses = token_losses(tensors).double().cpu().numpy()
        counted = tensors["shift_labels"].numpy() != IGNORE_INDEX
        for row, pieces in enumerate(contents):
            start = 0
            for piece in pieces:
                domain, stop = sums[piece.tag], start + piece.tokens
                domain[0] += float(losses[row, start:stop].sum())
                domain[1] += int(counted[row, start:stop].sum())
                start = stop
    if ranks.stopped:
        return None
    return _summary(ranks.gather(list(sums.items())))


def batches(
    ranks: Ranks, rows: Iterator[tuple[dict[str, np.ndarray], list]], batch_size: int
) -> Iterator[tuple[dict[str, torch.Tensor], list[list]]]:
    """Rows, each with what it holds, to batches: as many on every rank, until none has any more.

    Ends, with `ranks.stopped` set, when a signal has come.
    """
    while True:
        failure = None
        try:
            batch = list(itertools.islice(rows, batch_size))
        except InputError as error:  # of one rank's share of the documents
            failure, batch = error, []
        if ranks.any_rank(failure is not None):
            if failure is None:
                raise SystemExit(2)  # the rank that met it says so
            raise InputError(str(failure), one_rank=True)
        if ranks.stopped or not ranks.any_rank(any(contents for _, contents in batch)):
            return
        yield collate([row for row, _ in batch]), [contents for _, contents in batch]


def _rows(
    documents: Iterator[tuple[np.ndarray, str]], sequence_length: int
) -> Iterator[tuple[dict[str, np.ndarray], list[Piece]]]:
    """Rows that cut no document but one that is too long for a row; then empty ones, for ever."""
    group: list[tuple[np.ndarray, str]] = []
    room = sequence_length
    for tokens, domain in documents:
        if len(tokens) > room:
            yield from itertools.takewhile(_holds_documents, pack(iter(group), sequence_length))
            group, room = [], sequence_length
        group.append((tokens, domain))
        room -= len(tokens)
    yield from pack(iter(group), sequence_length)


def _holds_documents(row: tuple[dict[str, np.ndarray], list[Piece]]) -> bool:
    return bool(row[1])


def _summary(parts: list[tuple[str, list[float]]]) -> dict[str, Any]:
    domains: dict[str, np.ndarray] = {}
    for name, values in parts:
        domains[name] = domains.get(name, 0) + np.array(values, dtype=np.float64)
    if not domains:
        raise InputError("nothing to evaluate on: the validation sources hold no document")
    loss, tokens, size = sum(domains.values())
    return {
        "eval_loss": loss / tokens,
        "eval_bits_per_byte": loss / math.log(2) / size,
        "eval_tokens": int(tokens),
        "eval_loss_by_domain": {d: v[0] / v[1] for d, v in sorted(domains.items())},
        "eval_bits_per_byte_by_domain": {
            d: v[0] / math.log(2) / v[2] for d, v in sorted(domains.items())
        },
    }


def baselines(
    documents: Iterator[Document],
    train_documents: Iterator[Document],
    encode: Callable[[list[str]], list[np.ndarray]],
    vocabulary: int,
) -> dict[str, str]:
    """Bits per byte of `documents`, one by one, under gzip -9 and under a unigram model.

    The unigram model counts the tokens of `train_documents`, one added to each count, and like a
    language model pays for the end token of a document and not for the begin token.
    """
    counts = np.ones(vocabulary)
    for document in train_documents:
        counts += np.bincount(encode([document.text])[0][1:], minlength=vocabulary)
    bits_of_token = -np.log2(counts / counts.sum())
    size, gzip_bits, unigram_bits = 0, 0, 0.0
    for document in documents:
        text = document.text.encode()
        size += len(text)
        gzip_bits += 8 * len(gzip.compress(text, 9))
        unigram_bits += float(bits_of_token[encode([document.text])[0][1:]].sum())
    return {
        "bits per byte under a unigram model of the same tokenizer": f"{unigram_bits / size:.4f}",
        "bits per byte under gzip -9, document by document": f"{gzip_bits / size:.4f}",
    }


def batches_of(
    ranks: Ranks, lengths: list[int], budget: int, limit: int | None = None
) -> Iterator[list[int]]:
    """Every example once, over all ranks: indices of similar lengths, as many times on every rank.

    A rank that has no more gets empty lists. Ends, with `ranks.stopped` set, at a stop signal.

    Args:
        lengths: of the examples, in tokens.
        budget: of a batch, padding included, in tokens; a longer example comes alone.
        limit: of examples in a batch.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        longest = lengths[groups[-1][0]] if groups else 0
        size = len(groups[-1]) + 1 if groups else 0
        if not groups or size * longest > budget or (limit is not None and size > limit):
            groups.append([])
        groups[-1].append(index)
    for start in range(0, len(groups), ranks.world_size):
        if ranks.any_rank(False) or ranks.stopped:
            return
        yield dict(enumerate(groups[start : start + ranks.world_size])).get(ranks.rank, [])
