"""Pairs of a source and a target text as tokens, for encoder-decoders and for decoders alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from utils.config import InputError, Settings
from utils.loss import IGNORE_INDEX
from utils.progress import in_batches
from utils.tables import Table, TableRow, read_table

Example = dict[str, Any]


@dataclass
class PairArguments(Settings):
    """Where the pairs stand in a row, and how much of them is read."""

    source_column: str = "document"  # translation.en: what is inside of a column
    target_column: str = "summary"
    source_prefix: str = ""  # before the source; T5 was trained on "summarize: " and others
    source_suffix: str = ""  # between source and target of a decoder-only model: "\nTL;DR:\n"
    # tokens of the prompt, which is prefix, source and suffix; of a longer one the source is cut
    max_source_length: int = 512
    max_target_length: int = 128  # tokens, with the end token; a longer target is cut

    def check(self) -> None:
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 2:
                raise InputError(f"{name} must be at least 2, not {getattr(self, name)}")
        super().check()

    def fixed(self) -> dict[str, Any]:
        names = ("source_prefix", "source_suffix", "max_source_length", "max_target_length")
        return super().fixed() | {name: getattr(self, name) for name in names}

    def check_model_fits(self, config: Any, max_new_tokens: int) -> None:
        """Raises InputError where the settings do not suit the kind of model, or its positions."""
        kind = config.model_type
        if config.is_encoder_decoder and self.source_suffix:
            raise InputError(
                f"source_suffix: {kind} reads source and target apart: use source_prefix"
            )
        if not config.is_encoder_decoder and not self.source_suffix:
            raise InputError(
                f"source_suffix: {kind} has no encoder: give what stands between source and "
                'target, for example "\\nTL;DR:\\n"'
            )
        target = max(self.max_target_length, max_new_tokens)
        needed = {
            "max_source_length": self.max_source_length,
            "max_target_length, max_new_tokens": target,
        }
        if not config.is_encoder_decoder:
            needed = {
                "max_source_length + max_target_length or max_new_tokens": self.max_source_length
                + target
            }
        positions = getattr(config, "max_position_embeddings", math.inf)
        for names, length in needed.items():
            if length > positions:
                raise InputError(
                    f"{names}: {length} is more than the model's max_position_embeddings of "
                    f"{positions}"
                )


class Pair(NamedTuple):
    source: str
    target: str


def read_pairs(tables: list[Table], columns: PairArguments) -> list[Pair]:
    """All pairs of the tables. Raises InputError for a missing column or an empty text."""
    return [
        Pair(_text(row, columns.source_column), _text(row, columns.target_column))
        for table in tables
        for row in read_table(table)
    ]


def _text(row: TableRow, column: str) -> str:
    outer = column.partition(".")[0]
    if column not in row.values and isinstance(row.values.get(outer), dict):
        inside = {f"{outer}.{name}": value for name, value in row.values[outer].items()}
        row = row._replace(values=inside)
    return row.text(column)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError("tokenizer: it has no eos_token, which ends a target")


class PairEncoder:
    """Pairs → token ids.

    An encoder-decoder reads the source as its tokenizer has it, special tokens included. For a
    decoder alone the target follows the prompt, without a special token between them. Every target
    ends with the end token. Special tokens that stand in a text are read as plain text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: PairArguments, config: Any):
        self.tokenizer, self.arguments = tokenizer, arguments
        self.is_encoder_decoder = config.is_encoder_decoder
        self.cut_sources = self.cut_targets = 0

    def __call__(self, pairs: Sequence[Pair]) -> list[Example]:
        """
        Returns:
            Of each pair `input_ids`, source and target, and `source_length`, the tokens of the
            source among them. Those that were cut are counted.
        """
        examples: list[Example] = []
        for _, batch in in_batches(pairs, "pairs"):
            sources = self._sources([pair.source for pair in batch])
            targets = self._targets([pair.target for pair in batch])
            for source, target in zip(sources, targets, strict=True):
                tokens = np.array(source + target, np.int32)
                examples.append({"input_ids": tokens, "source_length": len(source)})
        return examples

    def _sources(self, texts: list[str]) -> list[list[int]]:
        a = self.arguments
        beginnings = [a.source_prefix + text for text in texts]
        if self.is_encoder_decoder:
            limit = {"truncation": True, "max_length": a.max_source_length}
            encoded = self._tokenize(beginnings, **limit)
            if encoded.encodings is None:  # a slow tokenizer does not say what it cut
                whole = self._encode(beginnings)
                self.cut_sources += sum(len(row) > a.max_source_length for row in whole)
            else:
                self.cut_sources += sum(bool(row.overflowing) for row in encoded.encodings)
            return encoded["input_ids"]
        rows = self._without_end(self._encode([text + a.source_suffix for text in beginnings]))
        (suffix,) = self._encode([a.source_suffix], add_special_tokens=False)
        room = a.max_source_length - len(suffix)
        for index, row in enumerate(rows):
            if len(row) > a.max_source_length:
                if room < 2:
                    raise InputError(
                        f"max_source_length: {a.max_source_length} leaves no room for a source "
                        f"beside the {len(suffix)} tokens of source_suffix"
                    )
                self.cut_sources += 1
                (beginning,) = self._without_end(self._encode([beginnings[index]]))
                rows[index] = beginning[:room] + suffix
        return rows

    def _targets(self, texts: list[str]) -> list[list[int]]:
        end, most = self.tokenizer.eos_token_id, self.arguments.max_target_length
        if self.is_encoder_decoder:
            rows = self.tokenizer(text_target=texts, split_special_tokens=True, verbose=False)
            rows = rows["input_ids"]
        else:
            rows = self._encode(texts, add_special_tokens=False)
        rows = self._without_end(rows)
        self.cut_targets += sum(len(row) >= most for row in rows)
        return [[*row[: most - 1], end] for row in rows]

    def _without_end(self, rows: list[list[int]]) -> list[list[int]]:
        """Without the end token that some tokenizers add to every text."""
        end = self.tokenizer.eos_token_id
        return [row[:-1] if row[-1:] == [end] else row for row in rows]

    def _encode(self, texts: list[str], **options: Any) -> list[list[int]]:
        return self._tokenize(texts, **options)["input_ids"]

    def _tokenize(self, texts: list[str], **options: Any) -> Any:
        return self.tokenizer(texts, split_special_tokens=True, verbose=False, **options)

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """A batch to train on; without examples, a row of padding and no target.

        `input_ids` and `attention_mask` (rows, tokens), `labels` the targets: in a tensor of their
        own or, for a decoder alone, at their places among the tokens.
        """
        if self.is_encoder_decoder:
            sources = [example["input_ids"][: example["source_length"]] for example in examples]
            targets = [example["input_ids"][example["source_length"] :] for example in examples]
        else:
            sources = [example["input_ids"] for example in examples]
            targets = [
                np.where(
                    np.arange(len(e["input_ids"])) < e["source_length"],
                    IGNORE_INDEX,
                    e["input_ids"],
                )
                for e in examples
            ]
        labels = _padded(targets, IGNORE_INDEX)
        end, padding = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        sources = sources or [np.array([end])]
        return {
            "input_ids": _padded(sources, end if padding is None else padding),
            "attention_mask": _padded([np.ones_like(source) for source in sources], 0),
            "labels": labels,
        }


def _padded(rows: Sequence[np.ndarray], padding: int) -> torch.Tensor:
    longest = max((len(row) for row in rows), default=1)
    padded = torch.full((max(1, len(rows)), longest), padding)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return padded
