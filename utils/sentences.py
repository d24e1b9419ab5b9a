"""Text to sentences to token ids, for the encoders that learn from pairs of segments.

A sentence here is what BERT calls one: a stretch of text, cut where a sentence or a paragraph
ends. Stretches of more than 400 characters (tables, code) are cut at a line's end or a blank.
"""

import re
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from utils.stream import TextEncoder

MAX_CHARACTERS = 400
# not before a small letter, which goes on after an abbreviation
_END = re.compile(
    r"""[.!?…]["'”’)\]]*(?=\s+[^\sa-z])|[。！？]["”』」）]*|\n(?=[^\S\n]*\n)""",  # noqa: RUF001
)


def cut_into_sentences(text: str) -> list[str]:
    """The sentences of a text; together they are the text. White space stands at their start."""
    sentences, start = [], 0
    for end in [*(match.end() for match in _END.finditer(text)), len(text)]:
        while end - start > MAX_CHARACTERS:
            limit = start + MAX_CHARACTERS
            line, blank = (text.rfind(mark, start + 1, limit) for mark in "\n ")
            cut = line if line > start else blank if blank > start else limit
            sentences.append(text[start:cut])
            start = cut
        sentences.append(text[start:end])
        start = end
    return sentences


@dataclass(frozen=True)
class Sentences:
    """The token ids of a document, int32, and where each of its sentences ends."""

    tokens: np.ndarray
    ends: list[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def between(self, start: int, end: int) -> np.ndarray:
        """The tokens of the sentences start … end - 1."""
        return self.tokens[self.ends[start - 1] if start else 0 : self.ends[end - 1]]

    def size(self, start: int, end: int) -> int:
        """How many tokens the sentences start … end - 1 have."""
        return self.ends[end - 1] - (self.ends[start - 1] if start else 0)


class SentenceEncoder(TextEncoder):
    """Texts → `Sentences`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        needed = ("mask_token", "cls_token", "sep_token")
        super().__init__(tokenizer, *needed, purpose="masked language modelling")

    def __call__(self, texts: list[str]) -> list[Sentences]:
        cut = [cut_into_sentences(text) for text in texts]
        encodings = iter(self.encode([sentence for sentences in cut for sentence in sentences]))
        documents = []
        for sentences in cut:
            tokens: list[int] = []
            ends = []
            for sentence in sentences:
                ids = next(encodings).ids
                if ids and not sentence.isspace():
                    tokens += ids
                    ends.append(len(tokens))
            documents.append(Sentences(np.array(tokens, np.int32), ends))
        return documents
