"""Labelled texts as a model reads them: token ids, batches, and what a training step is made of."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from augmentation import Augmenter
from labelled_texts import LabelledText
from utils.config import InputError
from utils.progress import in_batches
from utils.randomness import random_key
from utils.tables import naming_failures

Example = dict[str, Any]  # input_ids, of some models token_type_ids, the label and the table


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any, sequence_length: int) -> None:
    """Make tokenizer and configuration fit each other, here and where the export is read.

    A tokenizer without a padding token pads with its end token: what is padding, the attention
    mask says, and decoders find a text's last token as the last that is no padding token.

    Raises:
        InputError: nothing to pad with, or a model that cannot read padded rows, or an
            encoder-decoder.
    """
    if config.is_encoder_decoder:
        raise InputError(f"model: {config.model_type} is an encoder-decoder: take one of the two")
    if getattr(config, "summary_type", None) == "last":
        raise InputError(
            f"model: {config.model_type} classifies by the last place of a row, padding or not: "
            "take another model"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError("tokenizer: it has neither a padding nor an end token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    # a model with one type only (RoBERTa, decoders) takes no token_type_ids
    types = ["token_type_ids"] if getattr(config, "type_vocab_size", 0) > 1 else []
    tokenizer.model_input_names = ["input_ids", *types, "attention_mask"]
    tokenizer.model_max_length = sequence_length
    tokenizer.padding_side = tokenizer.truncation_side = "right"


def configure(config: Any, names: list[str], problem_type: str, dropout: dict[str, float]) -> None:
    """Labels and dropout; raises InputError for a dropout that the model does not have."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = problem_type
    known = [name for name in config.to_dict() if "drop" in name and "layerdrop" not in name]
    for name, value in dropout.items():
        if name not in known:
            raise InputError(
                f"dropout: {config.model_type} has no {name!r}; it has: {', '.join(known)}"
            )
        if not 0 <= value < 1:
            raise InputError(f"dropout.{name} must be in [0, 1), not {value}")
        setattr(config, name, value)


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, ...]]
) -> tuple[list[Example], int]:
    """Texts or pairs of texts → (examples, how many were cut to the tokenizer's longest).

    Special tokens that stand in a text are read as such, as transformers' pipelines do.
    """
    examples, cut = [], 0
    names = [name for name in tokenizer.model_input_names if name != "attention_mask"]
    for _, batch in in_batches(texts, "texts"):
        columns = [list(column) for column in zip(*batch, strict=True)]
        encoded = tokenizer(*columns, truncation=True)
        for row in zip(*(encoded[name] for name in names), strict=True):
            examples.append({n: np.array(v, np.int32) for n, v in zip(names, row, strict=True)})
        if encoded.encodings is None:  # a slow tokenizer does not say what it cut
            whole = tokenizer(*columns, verbose=False)["input_ids"]
            cut += sum(len(row) > tokenizer.model_max_length for row in whole)
        else:
            cut += sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    return examples, cut


def labelled_examples(
    tokenizer: PreTrainedTokenizerBase, rows: list[LabelledText], labels: np.ndarray
) -> tuple[list[Example], int]:
    """(examples, how many were cut).

    Raises:
        InputError: a text that has no tokens at all, or on which the tokenizer fails.
    """
    if not rows:
        return [], 0
    encode_rows = naming_failures(lambda part: encode(tokenizer, [row.texts for row in part]))
    examples, cut = encode_rows(rows)
    for row, example, label in zip(rows, examples, labels, strict=True):
        if len(example["input_ids"]) == 0:
            raise InputError(f"{row.place}: the tokenizer leaves nothing of the text")
        example |= {"label": label, "table": row.table}
    return examples, cut


def padded(examples: list[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and perhaps token_type_ids: (rows, tokens of the longest)."""
    size = len(examples), max(len(example["input_ids"]) for example in examples)
    batch = {"input_ids": torch.full(size, pad_token_id)}
    for name in ("attention_mask", *(n for n in ("token_type_ids",) if n in examples[0])):
        batch[name] = torch.zeros(size, dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        batch["attention_mask"][row, :length] = 1
        for name in batch.keys() & example.keys():
            batch[name][row, :length] = torch.from_numpy(example[name])
    return batch


def collate(rows: list[list[Example]], pad_token_id: int, label: Any) -> dict[str, torch.Tensor]:
    """Rows of one example or none to tensors, padded on the right to the longest.

    Args:
        label: any one: that of rows without an example, whose weight is 0.
    """
    empty = {"input_ids": np.array([pad_token_id]), "label": label, "weight": 0.0}
    examples = [row[0] if row else empty for row in rows]
    labels = torch.from_numpy(np.stack([example["label"] for example in examples]))
    is_id = labels.dim() == 1 and not labels.is_floating_point()
    return {
        **padded(examples, pad_token_id),
        "labels": labels if is_id else labels.float(),
        "weights": torch.tensor([example.get("weight", 1.0) for example in examples]),
        "noise_keys": torch.tensor([example.get("noise_key", 0) for example in examples]),
    }


class TrainingExamples:
    """(indices of a step, how often each was seen before) → its examples.

    The weights of a step's examples add up to their number: Σ weight x loss, divided by it, is
    then torch's weighted mean, however the step is split.

    Args:
        label_weights: of each label where a row has one; null: all the same.
    """

    def __init__(
        self,
        examples: list[Example],
        tokenizer: PreTrainedTokenizerBase,
        label_weights: list[float] | None,
        augmenter: Augmenter | None,
        seed: int,
    ):
        self.examples, self.tokenizer, self.augmenter = examples, tokenizer, augmenter
        self.label_weights, self.seed = label_weights, seed

    def __call__(self, indices: list[int], seen: list[int]) -> list[Example]:
        made = [self.examples[index] for index in indices]
        if self.augmenter is not None:
            texts = [self.augmenter(*each) for each in zip(indices, seen, strict=True)]
            varied, _ = encode(self.tokenizer, texts)
            # the rare text of which the tokenizer leaves nothing stays as it was
            pairs = zip(made, varied, strict=True)
            made = [old | new if len(new["input_ids"]) else old for old, new in pairs]
        weight = 1.0
        if self.label_weights is not None:
            weight = len(made) / sum(self.label_weights[example["label"]] for example in made)
        each = zip(seen, indices, strict=True)
        keys = [random_key(self.seed, "noise", epoch, index) for epoch, index in each]
        return [
            {**example, "weight": weight, "noise_key": key}
            for example, key in zip(made, keys, strict=True)
        ]
