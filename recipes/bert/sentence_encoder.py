"""Texts to the token ids of their sentences, of which segments are made."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from utils.records import cut_into_sentences
from utils.stream import TextEncoder


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
