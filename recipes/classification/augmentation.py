"""Training texts varied anew each time they are seen, as a function of (seed, time, row).

Four operations on words after EDA (Wei & Zou 2019), and two on the whole text. Where EDA takes
synonyms from WordNet, words of other training texts stand in (close to the unigram noising of Xie
et al. 2017): no dictionary and no language is presumed.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from labelled_texts import LabelledText
from utils.config import InputError
from utils.randomness import Draws
from utils.records import cut_into_sentences

Operation = Literal["replacement", "swap", "deletion", "insertion", "concatenation", "splitting"]
WORD_OPERATIONS = ("replacement", "swap", "deletion", "insertion")
_WORD = re.compile(r"\S+")


@dataclass
class Augmentation:
    """How the training texts are varied."""

    # one of these is drawn for each text: words are replaced, swapped, deleted or inserted; another
    # text of the same label is appended (concatenation); a part is taken (splitting)
    operations: list[Operation] = field(default_factory=lambda: list(WORD_OPERATIONS))
    probability: float = 0.8  # that a text is varied: EDA's 4 varied texts for each original
    word_share: float = 0.1  # of a text's words that are changed (EDA's alpha); at least one

    def check(self, problem_type: str, are_pairs: bool) -> None:
        if not self.operations:
            raise InputError("augmentation.operations: give at least one")
        for name in ("probability", "word_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"augmentation.{name} must be in [0, 1], not {getattr(self, name)}"
                )
        if "concatenation" in self.operations and (are_pairs or problem_type == "regression"):
            raise InputError(
                "augmentation.operations: concatenation joins texts of the same label: there are "
                "none in a regression, and pairs of texts cannot be joined"
            )


class Augmenter:
    """Training rows → texts to train on."""

    def __init__(self, rows: list[LabelledText], settings: Augmentation, seed: int):
        self.rows, self.settings, self.seed = rows, settings, seed
        self.same_label: dict[object, list[int]] = {}
        for index, row in enumerate(rows):
            self.same_label.setdefault(row.label, []).append(index)

    def __call__(self, index: int, seen: int) -> tuple[str, ...]:
        """The texts of a row that was seen so often before: none of them is ever empty."""
        row, settings = self.rows[index], self.settings
        draws = Draws(self.seed, "augmentation", seen, index)
        if not draws.chance(settings.probability):
            return row.texts
        operation = settings.operations[draws.below(len(settings.operations))]
        if operation == "concatenation":
            peers = self.same_label[row.label]
            other = self.rows[peers[draws.below(len(peers))]]
            return (f"{row.texts[0]}\n{other.texts[0]}",)
        if operation == "splitting":
            return tuple(_part(text, draws) for text in row.texts)
        return tuple(self._change_words(text, operation, draws) for text in row.texts)

    def _change_words(self, text: str, operation: str, draws: Draws) -> str:
        spans = [match.span() for match in _WORD.finditer(text)]
        count = max(1, round(self.settings.word_share * len(spans)))
        if operation == "deletion":
            count = min(count, len(spans) - 1)  # one word stays
        chosen = draws.permutation(len(spans))[:count]
        words = [text[start:end] for start, end in spans]
        # what stands after a word, blanks or the end of a line, stays behind it
        ends = [start for start, _ in spans[1:]] + [len(text)]
        gaps = [text[start:end] for (_, start), end in zip(spans, ends, strict=True)]
        for index in chosen:
            if operation == "swap":
                other = draws.below(len(words))
                words[index], words[other] = words[other], words[index]
            elif operation == "replacement":
                words[index] = self._word(draws)
            elif operation == "insertion":
                words[index] += f" {self._word(draws)}"
            else:
                words[index] = gaps[index] = ""
        return "".join(word + gap for word, gap in zip(words, gaps, strict=True)).strip()

    def _word(self, draws: Draws) -> str:
        """Of any training text, each text as likely as the others."""
        texts = self.rows[draws.below(len(self.rows))].texts
        words = _WORD.findall(texts[draws.below(len(texts))])
        return words[draws.below(len(words))]


def _part(text: str, draws: Draws) -> str:
    """A run of sentences from the beginning or the end; of a single one, half of its words."""
    parts = [part for part in cut_into_sentences(text) if part.strip()]
    if len(parts) < 2:
        spans = [match.span() for match in _WORD.finditer(text)]
        if len(spans) < 2:
            return text
        parts = [text[: spans[len(spans) // 2][0]], text[spans[len(spans) // 2][0] :]]
    cut = 1 + draws.below(len(parts) - 1)
    return ("".join(parts[:cut]) if draws.chance(0.5) else "".join(parts[cut:])).strip()
