"""Masked tokens and pairs of segments, as BERT, RoBERTa and ALBERT are trained on them.

Every draw is a function of (seed, lane, number of the sequence in its lane): masking is dynamic,
and the same whatever ran before.

Devlin et al. 2019 (MLM, next-sentence prediction), Liu et al. 2019 (dynamic masking, MLM alone),
Lan et al. 2020 (sentence-order prediction), Wettig et al. 2023 (other rates than 15%).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from sentence_encoder import Sentences
from utils.config import InputError, Settings
from utils.loss import IGNORE_INDEX
from utils.randomness import Draws


@dataclass
class MaskingArguments(Settings):
    """What the model is to find out. All of it is fixed for the life of a run."""

    # mlm_nsp: masked tokens and whether segment B follows A (BERT); mlm_sop: and whether A and B
    # stand in their order (ALBERT); mlm: masked tokens of one segment (RoBERTa)
    objective: Literal["mlm_nsp", "mlm_sop", "mlm"] = "mlm_nsp"
    mlm_probability: float = 0.15  # of a token to be predicted
    mask_replace_prob: float = 0.8  # of such a token to be replaced by the mask token …
    random_replace_prob: float = 0.1  # … or by any other; else it stays
    whole_word_masking: bool = False  # all tokens of a word, or none
    short_seq_prob: float = 0.1  # of a sequence to be shorter than it could be

    def fixed(self) -> dict[str, Any]:
        own = {item.name: getattr(self, item.name) for item in fields(MaskingArguments)}
        return super().fixed() | own

    def check_length(self, shortest: int) -> None:
        """Raises InputError for a length of a row that makes no examples."""
        if shortest < 8:
            what = "a sequence" if self.objective == "mlm" else "a pair"
            raise InputError(f"sequence_length: {shortest} is too short for {what}: at least 8")

    def check(self) -> None:
        for name in ("mlm_probability", "short_seq_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if self.mlm_probability == 0:
            raise InputError("mlm_probability: 0 leaves nothing to learn")
        parts = (self.mask_replace_prob, self.random_replace_prob)
        if min(parts) < 0 or sum(parts) > 1:
            raise InputError(
                "mask_replace_prob and random_replace_prob are shares of the masked tokens: "
                f"{parts[0]} and {parts[1]} are not"
            )
        super().check()


class Example(NamedTuple):
    """A sequence to learn from; arrays are int32 of shape (tokens,)."""

    input_ids: np.ndarray
    labels: np.ndarray  # the token where it is to be predicted, else -100
    token_type_ids: np.ndarray
    pair_label: int  # 0: as in the text, 1: random or swapped, -100: no pair
    document: int  # index of the document it was made of
    # of the text: tokens of the document itself, of another, and those that truncation took
    own: int
    borrowed: int
    cut: int


class Segments(NamedTuple):
    """What an example is made of, before it is masked."""

    first: np.ndarray
    second: np.ndarray | None
    pair_label: int
    end: int  # where the next example of the document begins: a sentence, or for mlm a token
    own: int
    cut: int


class ExampleMaker:
    """Documents → examples of at most a given length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: MaskingArguments):
        self.arguments = arguments
        self.first, self.separator = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.mask_token = tokenizer.mask_token_id
        special = {*tokenizer.all_special_ids}
        self.ordinary = np.array([i for i in range(len(tokenizer)) if i not in special], np.int32)
        self.unknown = tokenizer.unk_token_id  # the one special token that stands in texts
        self.words = WordStarts(tokenizer) if arguments.whole_word_masking else None

    def __call__(
        self, documents: Sequence[Sentences], names: Sequence, length: int, number: int, *key: Any
    ) -> Iterator[Example]:
        """The examples of documents, in order; a random next segment is one of another document.

        Every token is once in the segments of its own document, but for what truncation cuts.
        A document of a single sentence gives no pair: an example without a label for one.

        Args:
            names: of the documents: those with the same name are the same.
            length: of an example at most, special tokens included.
            number: of the first example; with `key`, what its draws depend on.
        """
        pool = [i for i, document in enumerate(documents) if document.ends]
        known = {names[i] for i in pool}
        alone = self.arguments.objective == "mlm"

        def random_document(draw: Draws, index: int) -> Sentences | None:
            if known <= {names[index]}:
                return None
            while names[other := pool[draw.below(len(pool))]] == names[index]:
                pass
            return documents[other]

        for index, document in enumerate(documents):
            start, stop = 0, len(document) if alone else len(document.ends)
            while start < stop:
                draw = Draws(*key, number)
                if alone:
                    segments = self._stretch(draw, document, start, length - 2)
                else:
                    is_nsp = self.arguments.objective == "mlm_nsp"
                    other = random_document(draw, index) if is_nsp else None
                    segments = self._pair(draw, document, start, length - 3, other)
                yield self._example(draw, segments, index)
                start, number = segments.end, number + 1

    def with_one_masked(self, tokens: np.ndarray, place: int) -> Example:
        """[CLS] tokens [SEP] with the mask token at `place`, which alone is to be predicted."""
        input_ids = np.array([self.first, *tokens, self.separator], np.int32)
        labels = np.full(len(input_ids), IGNORE_INDEX, np.int32)
        labels[place] = input_ids[place]
        input_ids[place] = self.mask_token
        types = np.zeros(len(input_ids), np.int32)
        return Example(input_ids, labels, types, IGNORE_INDEX, 0, len(tokens), 0, 0)

    def _stretch(self, draw: Draws, document: Sentences, start: int, room: int) -> Segments:
        first = document.tokens[start : start + self._target(draw, room)]
        return Segments(first, None, IGNORE_INDEX, start + len(first), len(first), 0)

    def _pair(
        self, draw: Draws, document: Sentences, start: int, room: int, other: Sentences | None
    ) -> Segments:
        """Segments A and B of whole sentences, which are then cut to fit, as BERT makes them.

        What stands where a random segment B was put is left for the next example.
        """
        is_nsp, target = self.arguments.objective == "mlm_nsp", self._target(draw, room)
        end, stop = start + 1, len(document.ends)
        while end < stop and (end < start + 2 or document.size(start, end) < target):
            end += 1
        if end < start + 2 or (is_nsp and other is None):
            text = document.between(start, end)
            first = _cut(draw, text, len(text) - room - 1)
            return Segments(first, None, IGNORE_INDEX, end, len(first), len(text) - len(first))
        middle = start + 1 + draw.below(end - start - 1)
        label = int(draw.chance(0.5))
        is_random = is_nsp and label == 1
        first, second = document.between(start, middle), document.between(middle, end)
        if is_random:
            end, second = middle, self._random_next(draw, other, target - len(first))
        elif label:
            first, second = second, first
        sizes = _fitting(len(first), len(second), room)
        kept_first = _cut(draw, first, len(first) - sizes[0])
        kept_second = _cut(draw, second, len(second) - sizes[1])
        own = len(kept_first) + (0 if is_random else len(kept_second))
        cut = document.size(start, end) - own
        return Segments(kept_first, kept_second, label, end, own, cut)

    def _target(self, draw: Draws, room: int) -> int:
        return 2 + draw.below(room - 1) if draw.chance(self.arguments.short_seq_prob) else room

    def _random_next(self, draw: Draws, other: Sentences, target: int) -> np.ndarray:
        """From a random sentence of another document on, until the target is reached."""
        start, stop = draw.below(len(other.ends)), len(other.ends)
        end = start + 1
        while end < stop and other.size(start, end) < target:
            end += 1
        return other.between(start, end)

    def _example(self, draw: Draws, segments: Segments, document: int) -> Example:
        first, second = segments.first, segments.second
        size = len(first) + 2 + (0 if second is None else len(second) + 1)
        input_ids = np.full(size, self.separator, np.int32)
        types = np.zeros(size, np.int32)
        is_text = np.ones(size, bool)
        input_ids[0] = self.first
        input_ids[1 : len(first) + 1] = first
        if second is not None:
            input_ids[len(first) + 2 : -1] = second
            types[len(first) + 2 :] = 1
        is_text[[0, len(first) + 1, -1]] = False
        # an unknown token stands for what cannot be predicted
        is_open = is_text if self.unknown is None else is_text & (input_ids != self.unknown)
        input_ids, labels = self._mask(draw, input_ids, is_open)
        borrowed = int(is_text.sum()) - segments.own
        return Example(
            input_ids,
            labels,
            types,
            segments.pair_label,
            document,
            segments.own,
            borrowed,
            segments.cut,
        )

    def _mask(
        self, draw: Draws, tokens: np.ndarray, is_open: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(input ids, labels): each word or token that is open to it has the same chance."""
        a = self.arguments
        # the number of the unit (word or token) that each token belongs to; they fall together
        units = (is_open if self.words is None else self.words(tokens, is_open)).cumsum() - 1
        count = int(units[-1]) + 1
        # as many as the rate says: what is left of a whole number is drawn
        chosen = int(count * a.mlm_probability + draw.uniform(1)[0])
        is_chosen = np.zeros(count + 1, bool)
        is_chosen[np.argsort(draw.uniform(count), kind="stable")[:chosen]] = True
        selected = np.flatnonzero(is_chosen[units] & is_open)
        labels = np.full(len(tokens), IGNORE_INDEX, np.int32)
        labels[selected] = tokens[selected]
        kind, other = draw.uniform(2 * len(selected)).reshape(2, -1)
        replacement = np.where(
            kind < a.mask_replace_prob,
            self.mask_token,
            self.ordinary[(other * len(self.ordinary)).astype(int)],
        )
        is_replaced = kind < a.mask_replace_prob + a.random_replace_prob
        tokens[selected[is_replaced]] = replacement[is_replaced]
        return tokens, labels


class WordStarts:
    """Whether a token begins a word: by WordPiece's prefix, or else as byte-level BPE cuts words.

    There a word begins with a blank, and where letters, digits and other signs meet.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        prefix = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
        self.by_prefix = bool(prefix)
        if prefix:
            self.begins = np.array([not token.startswith(prefix) for token in tokens])
        else:
            is_bytes = "Ġ" in tokens
            self.begins = np.array([token[:1] in ("Ġ", "▁") for token in tokens])
            self.first = np.array([_kind(token[:1], is_bytes) for token in tokens])
            self.last = np.array([_kind(token[-1:], is_bytes) for token in tokens])

    def __call__(self, tokens: np.ndarray, is_open: np.ndarray) -> np.ndarray:
        """Of shape (tokens,); only what is open to masking, and after what is not, begins one."""
        begins = self.begins[tokens]
        if not self.by_prefix:
            last = self.last[tokens[:-1]]
            # a blank belongs to what follows it
            begins[1:] |= (self.first[tokens[1:]] != last) & (last != BLANK)
        begins[1:] |= ~is_open[:-1]
        return begins & is_open


LETTER, DIGIT, SPACE, BLANK, OTHER = range(5)


def _kind(sign: str, is_bytes: bool) -> int:
    """Of a character of a token; byte-level BPE spells bytes by stand-ins (GPT-2's encoder.py)."""
    if sign in ("Ġ", "▁"):
        return BLANK
    if is_bytes and len(sign) == 1 and ord(sign) > 126:
        # in this order: the bytes 0 to 32 and 127, then those of letters beyond ASCII
        return SPACE if 256 <= ord(sign) <= 289 else LETTER
    return DIGIT if sign.isdigit() else LETTER if sign.isalpha() else OTHER


def _fitting(first: int, second: int, room: int) -> tuple[int, int]:
    """The lengths once the longer of two segments is shortened, token by token, until both fit."""
    excess = max(0, first + second - room)
    level = min(excess, abs(first - second))
    if first > second:
        first -= level
    else:
        second -= level
    excess -= level
    return first - excess // 2, second - (excess + 1) // 2


def _cut(draw: Draws, tokens: np.ndarray, excess: int) -> np.ndarray:
    """Without `excess` tokens, each of them taken from the front or from the back at random."""
    if excess <= 0:
        return tokens
    front = int((draw.uniform(excess) < 0.5).sum())
    return tokens[front : len(tokens) - (excess - front)]
