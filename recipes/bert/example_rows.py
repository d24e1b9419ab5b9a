"""Examples of masked language modelling to rows of a step: packed, resumable, in phases.

A lane takes its documents in *windows* of some 16 thousand tokens, makes the examples of a window,
and fits them into as few rows as it can: no attention crosses from one example of a row to
another, and a few percent of a row are padding. The state is where the window began and how many
of its rows are spent; a resume tokenizes that window again.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from masking import Example, ExampleMaker
from sentence_encoder import SentenceEncoder
from utils import epochs
from utils.config import InputError
from utils.lanes import Lane, Lanes, count_tokens, encode_documents
from utils.loss import IGNORE_INDEX
from utils.randomness import keyed_permutation
from utils.sources import DEFAULTS, BadRecords, Source, SourceArguments, held_out_documents
from utils.stream import Row

WINDOW_TOKENS = 2**14
CHECKED_DOCUMENTS = 1000  # of a source, at most
EMPTY_DOCUMENTS = 10_000  # without a token, in a row: there is something else wrong


def example_rows(
    lanes: Lanes,
    make_examples: ExampleMaker,
    phases: Sequence[tuple[int, int]],
    packing: bool,
    lane_index: int,
    state: dict[str, Any] | None,
) -> Iterator[Row]:
    """The rows of one lane, for ever: when its documents are spent, rows without any target.

    Args:
        phases: (sequence_length, rows of the lane) one after the other, of growing length; the
            last goes on. The examples of a window are made for the phase in which it begins.
        packing: else every example has a row of its own.

    The state is {"lane": where the window begins, "window_row": the row it begins with, "row": the
    next one, "example": the number of its first example, "seen": tokens in rows by source and
    domain, "counts": of sequences, and of what happened to the text}.
    """
    zero = {"lane": None, "window_row": 0, "row": 0, "example": 0, "seen": {}, "counts": {}}
    state = state or zero
    lane = Lane(lanes, lane_index, state["lane"])
    seed = lanes.corpus.seed
    row, resume_row, example = state["window_row"], state["row"], state["example"]
    seen, counts = dict(state["seen"]), dict(state["counts"])
    is_spent, unheard = False, {}
    while True:
        before, window_row = lane.state(), row
        length = _length_at(phases, row)
        window = [] if is_spent else _take_window(lane, max(WINDOW_TOKENS, 32 * length))
        is_spent = is_spent or not window
        documents = [sentences for sentences, _, _ in window]
        names = [(document.file, document.position) for _, document, _ in window]
        examples = list(
            make_examples(documents, names, length, example, seed, "example", lane_index)
        )
        # so that long examples are not always the first
        order = keyed_permutation(len(examples), seed, "rows", lane_index, window_row)
        rows = fit([examples[i] for i in order], length, packing)
        _add(unheard, _document_counts(documents, examples, make_examples))
        while rows or is_spent:
            if length != (length := _length_at(phases, row)):
                rows = fit([example for group in rows for example in group], length, packing)
            group, rows = (rows[0], rows[1:]) if rows else ([], [])
            row += 1
            if row <= resume_row:
                unheard = {}  # an earlier row has told
                continue
            for made in group:
                _, document, source = window[made.document]
                count_tokens(seen, source, document, made.own)
            _add(counts, unheard)
            _add(counts, _counts_of(group))
            unheard = {}
            where = {"lane": before, "window_row": window_row, "row": row, "example": example}
            if not rows:
                where |= {"lane": lane.state(), "window_row": row}
                where["example"] += len(examples)
            after = {**where, "seen": dict(seen), "counts": dict(counts), "epochs": lane.epochs}
            tokens = sum(len(made.input_ids) for made in group)
            yield Row(lane_index, features(group, length), after, tokens)
        example += len(examples)


def check_examples(
    sources: list[Source],
    encode: SentenceEncoder,
    objective: str,
    arguments: SourceArguments = DEFAULTS,
) -> None:
    """Raises InputError when the corpus has nothing that the objective could learn from.

    Looks at the first documents of each source, until there are two, and one makes a pair.
    """
    found, has_text, has_pair = 0, False, False
    report = BadRecords(arguments.on_bad_record).report
    for document in held_out_documents(sources, CHECKED_DOCUMENTS, arguments):
        (sentences,) = encode_documents(encode, [document], report)
        if sentences is None:
            continue
        found += 1
        has_text, has_pair = has_text or len(sentences) > 0, has_pair or len(sentences.ends) >= 2
        is_enough = {"mlm": has_text, "mlm_sop": has_pair, "mlm_nsp": has_pair and found >= 2}
        if is_enough[objective]:
            return
    paths = ", ".join(source.path for source in sources)
    if not has_text:
        raise InputError(
            f"the first {found} documents of {paths} hold nothing that the tokenizer knows"
        )
    if found == 1 and has_pair:
        problem = f"mlm_nsp takes random next segments from other documents; {paths} holds only one"
    else:
        problem = (
            f"{objective} needs documents of two sentences or more; the first {found} of {paths} "
            "have one at most"
        )
    raise InputError(f"objective: {problem}: set objective: mlm, or give other documents")


def fit(examples: list[Example], length: int, packing: bool = True) -> list[list[Example]]:
    """Examples → rows of at most `length` tokens: the longest first, each where it fits tightest.

    The rows come in the order of their earliest examples.
    """
    if not packing:
        return [[example] for example in examples]
    rows = epochs.fit([len(example.input_ids) for example in examples], length)
    return [[examples[index] for index in row] for row in rows]


def features(examples: list[Example], length: int) -> dict[str, np.ndarray]:
    """A row: int32 arrays of shape (length,).

    `sequence_ids` number the examples of the row from 1 (padding: 0), `position_ids` restart with
    each, and `pair_labels` stands at its first token.
    """
    names = ("input_ids", "labels", "token_type_ids", "position_ids", "sequence_ids", "pair_labels")
    row = {name: np.zeros(length, np.int32) for name in names}
    row["labels"][:], row["pair_labels"][:] = IGNORE_INDEX, IGNORE_INDEX
    start = 0
    for number, example in enumerate(examples, 1):
        end = start + len(example.input_ids)
        for name in ("input_ids", "labels", "token_type_ids"):
            row[name][start:end] = getattr(example, name)
        row["position_ids"][start:end] = np.arange(end - start)
        row["sequence_ids"][start:end] = number
        row["pair_labels"][start] = example.pair_label
        start = end
    row["position_ids"][start:] = np.arange(length - start)
    return row


def block_diagonal_mask(sequence_ids: torch.Tensor, config: Any, dtype: torch.dtype) -> Any:
    """An attention mask by which the sequences of a row do not see each other.

    Additive, because eager attention takes booleans for numbers. Where the model has layers of
    sliding attention, a dict with a mask for each kind of layer, as ModernBERT takes it.

    Args:
        sequence_ids: (rows, sequence_length).

    Returns:
        (rows, 1, sequence_length, sequence_length): 0 or the smallest number of the dtype.
    """
    blocks = sequence_ids[:, None, :, None] == sequence_ids[:, None, None, :]
    smallest = torch.finfo(dtype).min
    mask = torch.where(blocks, 0.0, smallest).to(dtype)
    config = config.get_text_config()
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return mask
    place = torch.arange(blocks.shape[-1], device=blocks.device)
    is_far = (place[:, None] - place[None, :]).abs() > config.sliding_window
    return {"full_attention": mask, "sliding_attention": mask.masked_fill(is_far, smallest)}


def _length_at(phases: Sequence[tuple[int, int]], row: int) -> int:
    for length, rows in phases:
        if row < rows:
            return length
        row -= rows
    return phases[-1][0]


def _take_window(lane: Lane, tokens: int) -> list[tuple]:
    """The next documents of the lane: two at least, so that there is a random next segment."""
    window, size, empty = [], 0, 0
    while size < tokens or len(window) < 2:
        item = lane.next()
        if item is None:
            break
        window.append(item)
        size += len(item[0])
        empty = 0 if len(item[0]) else empty + 1
        if empty == EMPTY_DOCUMENTS:
            raise InputError(
                f"source {item[2].path!r}: {empty:,} documents in a row, the last in "
                f"{item[1].file}, hold nothing that the tokenizer knows",
                one_rank=True,
            )
    return window


def _document_counts(documents: list, examples: list[Example], maker: ExampleMaker) -> dict:
    if maker.arguments.objective == "mlm":
        return {}
    with_pair = {example.document for example in examples if example.pair_label != IGNORE_INDEX}
    return {"documents": len(documents), "documents_without_pair": len(documents) - len(with_pair)}


def _counts_of(examples: list[Example]) -> dict[str, int]:
    pairs = [example.pair_label for example in examples if example.pair_label != IGNORE_INDEX]
    return {
        "sequences": len(examples),
        "pairs": len(pairs),
        "tokens_borrowed": sum(example.borrowed for example in examples),
        "tokens_cut": sum(example.cut for example in examples),
    }


def _add(counts: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count
