"""Loss and bits per byte on held-out documents, by domain, over all ranks."""

import gzip
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from packing import Piece, pack
from utils.config import InputError
from utils.lanes import encode_documents
from utils.loss import IGNORE_INDEX
from utils.ranks import Ranks
from utils.scoring import batches
from utils.sources import BadRecords, Document


def evaluate_by_domain(
    ranks: Ranks,
    documents: Iterator[Document],
    encode: Callable[[list[str]], list[np.ndarray]],
    token_losses: Callable[..., torch.Tensor],
    sequence_length: int,
    batch_size: int,
    packing: bool = True,
    on_bad_record: str = "fail",
) -> dict[str, Any] | None:
    """Mean loss over the target tokens, and bits per byte of the text, in all and by domain.

    A document is scored from its begin to its end token; one that is longer than sequence_length
    in pieces of that length, which do not see each other. So the numbers depend neither on the
    other documents nor on the number of ranks; the bits per byte are those of a code for whole
    documents. Every rank takes every world_size-th document; sums are in float64.

    Args:
        token_losses: batch → losses of shape (rows, sequence_length); every rank calls it as often.
        on_bad_record: what a document does on which the tokenizer fails: "fail" or "skip".

    Returns:
        None when a stop signal came in between.
    """
    sums: dict[str, list[float]] = {}  # domain → [loss, target tokens, bytes]
    mine = itertools.islice(documents, ranks.rank, None, ranks.world_size)

    def encoded() -> Iterator[tuple[np.ndarray, str]]:
        for document, tokens in _encoded(mine, encode, on_bad_record):
            domain = sums.setdefault(document.domain, [0.0, 0, 0])
            domain[2] += len(document.text.encode())
            yield tokens, document.domain

    for tensors, contents in batches(ranks, _rows(encoded(), sequence_length, packing), batch_size):
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


def _encoded(
    documents: Iterator[Document], encode: Callable[[list[str]], list[np.ndarray]], policy: str
) -> Iterator[tuple[Document, np.ndarray]]:
    report = BadRecords(policy, one_rank=True).report
    for document in documents:
        (tokens,) = encode_documents(encode, [document], report)
        if tokens is not None:
            yield document, tokens


def _rows(
    documents: Iterator[tuple[np.ndarray, str]], sequence_length: int, packing: bool
) -> Iterator[tuple[dict[str, np.ndarray], list[Piece]]]:
    """Rows that cut no document but one that is too long for a row; then empty ones, for ever."""
    group: list[tuple[np.ndarray, str]] = []
    room = sequence_length
    for tokens, domain in documents:
        if len(tokens) > room:
            yield from itertools.takewhile(
                _holds_documents, pack(iter(group), sequence_length, 0, packing)
            )
            group, room = [], sequence_length
        group.append((tokens, domain))
        room -= len(tokens)
    yield from pack(iter(group), sequence_length, 0, packing)


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
    on_bad_record: str = "fail",
) -> dict[str, str]:
    """Bits per byte of `documents`, one by one, under gzip -9 and under a unigram model.

    The unigram model counts the tokens of `train_documents`, one added to each count, and like a
    language model pays for the end token of a document and not for the begin token.
    """
    counts = np.ones(vocabulary)
    for _, tokens in _encoded(train_documents, encode, on_bad_record):
        counts += np.bincount(tokens[1:], minlength=vocabulary)
    bits_of_token = -np.log2(counts / counts.sum())
    size, gzip_bits, unigram_bits = 0, 0, 0.0
    for document, tokens in _encoded(documents, encode, on_bad_record):
        text = document.text.encode()
        size += len(text)
        gzip_bits += 8 * len(gzip.compress(text, 9))
        unigram_bits += float(bits_of_token[tokens[1:]].sum())
    return {
        "bits per byte under a unigram model of the same tokenizer": f"{unigram_bits / size:.4f}",
        "bits per byte under gzip -9, document by document": f"{gzip_bits / size:.4f}",
    }
