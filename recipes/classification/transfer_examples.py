"""What a student learns from its teacher by: texts with labels, texts without, and varied ones."""

import json
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from augmentation import Augmenter
from classification_examples import Example, collate, encode, labelled_examples, padded
from labelled_texts import LabelledText, label_ids
from utils.config import InputError
from utils.epochs import hold_out
from utils.program import warn


def parts_of_transfer(
    rows: dict[str, list[LabelledText]], arguments: Any
) -> tuple[dict[str, list[LabelledText]], dict[str, str]]:
    """`hold_out` for rows of which some have no label: only those that have are held out.

    Args:
        rows: "train", "validation", "test", and "transfer", which has no labels.

    Returns:
        "train", those with labels first, "validation" and "test"; the facts for the card.
    """
    a, texts, validation = arguments, attrgetter("texts"), rows["validation"]
    labelled = [row for row in rows["train"] if row.label is not None]
    unlabelled = [row for row in rows["train"] + rows["transfer"] if row.label is None]
    if a.validation_split is not None:
        (labelled, validation, _), _ = hold_out([labelled, [], []], texts, a)
        held_out = {row.texts for row in validation}
        unlabelled = [row for row in unlabelled if row.texts not in held_out]
        a = replace(a, validation_split=None)
    parts, facts = hold_out([labelled + unlabelled, validation, rows["test"]], texts, a)
    return dict(zip(("train", "validation", "test"), parts, strict=True)), facts


def transfer_labels(
    rows: dict[str, list[LabelledText]], names: list[str], arguments: Any
) -> tuple[dict[str, np.ndarray], int]:
    """(the labels as numbers, 0 where there are none; how many training rows have one).

    Args:
        rows: as `parts_of_transfer` returns them.

    Raises:
        InputError: nothing to learn from; an unknown label.
    """
    labelled = sum(row.label is not None for row in rows["train"])
    if not labelled and not arguments.soft_weight and not arguments.hidden_weight:
        raise InputError("hard_weight: no row of train_data has a label to learn")
    if not labelled and arguments.hard_weight:
        warn(
            f"no row of train_data has a {arguments.label_column}: the teacher alone is learnt from"
        )
    found = {
        split: label_ids(part[:labelled] if split == "train" else part, names, arguments)
        for split, part in rows.items()
    }
    known = found["train"]
    rest = (len(rows["train"]) - labelled, *known.shape[1:])
    return found | {"train": np.concatenate([known, np.zeros(rest, known.dtype)])}, labelled


def have_same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both make the same token ids of every text."""
    if not one.is_fast or not other.is_fast:
        return False
    found = [json.loads(each.backend_tokenizer.to_str()) for each in (one, other)]
    for each in found:
        each.pop("truncation"), each.pop("padding")  # as they were used last
    return found[0] == found[1]


class Reader:
    """Texts → examples: as the student reads them and, under "teacher", as its teacher does.

    Args:
        tokenizer, of_teacher: as `check_tokenizer` leaves them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, of_teacher: PreTrainedTokenizerBase):
        self.tokenizer, self.of_teacher = tokenizer, of_teacher
        own, its = ((each.model_input_names, each.pad_token_id) for each in (tokenizer, of_teacher))
        self.is_one = own == its and have_same_tokens(tokenizer, of_teacher)

    def read(self, rows: list[LabelledText], labels: np.ndarray) -> tuple[list[Example], int]:
        """As `labelled_examples`."""
        examples, cut = labelled_examples(self.tokenizer, rows, labels)
        if not self.is_one:
            taught, _ = labelled_examples(self.of_teacher, rows, labels)
            for example, of_teacher in zip(examples, taught, strict=True):
                example["teacher"] = of_teacher
        return examples, cut

    def encode(self, texts: list[tuple[str, ...]]) -> list[Example]:
        examples, _ = encode(self.tokenizer, texts)
        if not self.is_one:
            taught, _ = encode(self.of_teacher, texts)
            examples = [e | {"teacher": t} for e, t in zip(examples, taught, strict=True)]
        return examples

    def collate(self, rows: list[list[Example]], label: Any) -> dict[str, torch.Tensor]:
        """As `collate`; row_weights are 1, of rows without an example 0."""
        batch = collate(rows, self.tokenizer.pad_token_id, label)
        del batch["noise_keys"]
        batch["row_weights"] = torch.tensor([float(len(row)) for row in rows])
        if not self.is_one:
            pad = self.of_teacher.pad_token_id
            empty = {"input_ids": np.array([pad])}
            seen = padded([row[0]["teacher"] if row else empty for row in rows], pad)
            batch |= {f"teacher_{name}": tensor for name, tensor in seen.items()}
        return batch


class TransferExamples:
    """(indices of a step, how often each was seen before) → its examples.

    The indices are those of the texts, and after them all of their varied copies.

    The weights of a step's labels add up to their number, as in `TrainingExamples`; of a text
    without a label, and of a varied copy, the weight is 0: only its teacher says what it is.

    Args:
        labelled: how many have a label: the first ones.
        label_weights: of each label where a row has one; null: all the same.
        augmenter: of the rows, as often as there are copies and the texts themselves.
    """

    def __init__(
        self,
        examples: list[Example],
        labelled: int,
        label_weights: list[float] | None,
        augmenter: Augmenter | None,
        encode: Callable[[list[tuple[str, ...]]], list[Example]],
    ):
        self.examples, self.labelled, self.label_weights = examples, labelled, label_weights
        self.augmenter, self.encode = augmenter, encode

    def __call__(self, indices: list[int], seen: list[int]) -> list[Example]:
        count = len(self.examples)
        made = [self.examples[index % count] for index in indices]
        copies = [place for place, index in enumerate(indices) if index >= count]
        texts = [self.augmenter(indices[place], seen[place]) for place in copies]
        for place, example in zip(copies, self.encode(texts) if texts else [], strict=True):
            # the rare text of which a tokenizer leaves nothing stays as it was
            if len(example["input_ids"]) and len(example.get("teacher", example)["input_ids"]):
                made[place] = made[place] | example
        weights = np.array([float(index < self.labelled) for index in indices])
        if self.label_weights is not None and weights.any():
            of_labels = np.array([self.label_weights[example["label"]] for example in made])
            weights *= weights.sum() / (weights * of_labels).sum()
        return [{**e, "weight": w} for e, w in zip(made, weights.tolist(), strict=True)]
