"""Documents to rows: every token once, no row with padding but a lane's last, if packed.

A document is encoded as [begin] + tokens + [end]: begin is the tokenizer's bos (eos where it has
none), end its eos. Rows are filled to the last position; what does not fit continues in the next
row. `shift_labels[i]` is the token after `input_ids[i]` in the same document, -100 at its end, so
a document cut in two loses no target. `position_ids` restart with every document and every row.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from utils.lanes import Lane, Lanes, count_tokens
from utils.loss import IGNORE_INDEX
from utils.stream import Row, TextEncoder


class DocumentEncoder(TextEncoder):
    """Texts → [begin] + int32 token ids + [end]."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, "eos_token", purpose="causal language modelling")
        self.end = tokenizer.eos_token_id
        self.begin = self.end if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        documents = []
        for encoding in self.encode(texts):
            ids = encoding.ids
            tokens = np.empty(len(ids) + 2, np.int32)
            tokens[0], tokens[1:-1], tokens[-1] = self.begin, ids, self.end
            documents.append(tokens)
        return documents


def begin_as_documents(tokenizer: PreTrainedTokenizerBase, begin: int) -> None:
    """Make [begin] + tokens of the tokenizer's own template: where the export is read, a prompt is
    to begin as the documents have begun."""
    if tokenizer.encode("a") != [begin, *tokenizer.encode("a", add_special_tokens=False)]:
        token = tokenizer.convert_ids_to_tokens(begin)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token}:0 $A:0",
            pair=f"{token}:0 $A:0 {token}:1 $B:1",
            special_tokens=[(token, begin)],
        )


class Piece(NamedTuple):
    """A stretch of a document in a row."""

    tag: Any  # what came with the document
    tokens: int
    end: int  # the token of the document that the stretch ends before
    is_last: bool  # the document ends here


def pack(
    documents: Iterator[tuple[np.ndarray, Any]],
    sequence_length: int,
    offset: int = 0,
    packing: bool = True,
) -> Iterator[tuple[dict[str, np.ndarray], list[Piece]]]:
    """(token ids, tag) of documents → rows, each with the pieces of documents that it is made of.

    Features are int32 arrays of shape (sequence_length,): `input_ids`, `shift_labels`,
    `position_ids`; and `lengths`, a number: the tokens before the padding. The first document
    begins at token `offset`. Only the last row has padding, or without `packing` every one that
    ends with its document.
    """
    places = np.arange(sequence_length, dtype=np.int32)
    tokens, tag = None, None
    while True:
        input_ids = np.zeros(sequence_length, dtype=np.int32)
        shift_labels = np.full(sequence_length, IGNORE_INDEX, dtype=np.int32)
        position_ids = np.empty(sequence_length, dtype=np.int32)
        filled, pieces = 0, []
        while filled < sequence_length:
            if tokens is None:
                tokens, tag = next(documents, (None, None))
                if tokens is None:
                    break
            end = min(len(tokens), offset + sequence_length - filled)
            taken = end - offset
            input_ids[filled : filled + taken] = tokens[offset:end]
            following = tokens[offset + 1 : end + 1]
            shift_labels[filled : filled + len(following)] = following
            position_ids[filled : filled + taken] = places[:taken]
            pieces.append(Piece(tag, taken, end, end == len(tokens)))
            filled, offset = filled + taken, end
            if end == len(tokens):
                tokens, offset = None, 0
            if not packing:
                break
        position_ids[filled:] = places[: sequence_length - filled]
        features = {
            "input_ids": input_ids,
            "shift_labels": shift_labels,
            "position_ids": position_ids,
            "lengths": np.int32(filled),
        }
        yield features, pieces


def packed_rows(
    lanes: Lanes,
    sequence_length: int,
    lane_index: int,
    state: dict[str, Any] | None,
    packing: bool = True,
) -> Iterator[Row]:
    """The rows of one lane, for ever: when its documents are spent, rows without any target.

    Without `packing` a row holds one document, or a piece of one that is longer.

    The state is {"lane": where the unfinished document begins, "offset": tokens of it already in
    rows, "seen": tokens in rows by source and domain}.
    """
    state = state or {"lane": None, "offset": 0, "seen": {}}
    lane, seen = Lane(lanes, lane_index, state["lane"]), dict(state["seen"])

    def documents() -> Iterator[tuple[np.ndarray, Any]]:
        while True:
            before = lane.state()
            item = lane.next()
            if item is None:
                return
            tokens, document, source = item
            yield tokens, (before, source, document)

    for features, pieces in pack(documents(), sequence_length, state["offset"], packing):
        for piece in pieces:
            _, source, document = piece.tag
            count_tokens(seen, source, document, piece.tokens)
        if not pieces or pieces[-1].is_last:
            after = {"lane": lane.state(), "offset": 0}  # the next document is not asked for yet
        else:
            after = {"lane": pieces[-1].tag[0], "offset": pieces[-1].end}
        tokens = sum(piece.tokens for piece in pieces)
        state = {**after, "seen": dict(seen), "epochs": lane.epochs}
        yield Row(lane_index, features, state, tokens)
