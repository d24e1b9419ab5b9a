"""Pairs of a source and a target text as tokens, for encoder-decoders and for decoders alone."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from utils.config import InputError, Settings
from utils.loss import IGNORE_INDEX
from utils.model import first_position
from utils.progress import in_batches
from utils.tables import Table, read_table

Example = dict[str, Any]


@dataclass
class PairArguments(Settings):
    """Where the pairs stand in a row, and how much of them is read."""

    source_column: str = "document"  # translation.en: what is inside of a column
    target_column: str = "summary"
    # before the source, such as T5's "translate English to German: "; null: that of the given model
    # for such a task, if its task_specific_params have one ("summarize: "), or else none
    source_prefix: str | None = None
    source_suffix: str = ""  # between source and target of a decoder-only model: "\nTL;DR:\n"
    # tokens of the prompt, which is prefix, source and suffix; of a longer one the source is cut
    max_source_length: int = 512
    max_target_length: int = 128  # tokens, special ones included; a longer target is cut
    # of mBART, mBART-50, M2M100, NLLB, as the tokenizer writes them: en_XX, ro_RO; null: those that
    # the tokenizer was saved with
    source_lang: str | None = None
    target_lang: str | None = None

    def check(self) -> None:
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) < 2:
                raise InputError(f"{name} must be at least 2, not {getattr(self, name)}")
        super().check()

    def fixed(self) -> dict[str, Any]:
        names = ("source_suffix", "max_source_length", "max_target_length")
        own = {name: getattr(self, name) for name in (*names, "source_lang", "target_lang")}
        return super().fixed() | own | {"source_prefix": self.source_prefix or ""}

    def check_model_fits(self, model: "transformers.PreTrainedModel", max_new_tokens: int) -> None:
        """Raises InputError where the settings do not suit the kind of model, or its positions."""
        config, kind = model.config, model.config.model_type
        if kind == "prophetnet" and (not config.disable_ngram_loss or config.eps):
            raise InputError(
                f"model: {kind} has a loss of its own, of several tokens ahead: set "
                "disable_ngram_loss: true and eps: 0.0 in its config"
            )
        if kind == "nllb-moe" and config.output_router_logits:
            raise InputError(
                "model.output_router_logits: transformers' own nllb-moe fails with it: set it to "
                "false"
            )
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
        if config.is_encoder_decoder:
            needed = {
                "max_source_length": (self.max_source_length, positions(model, "encoder")),
                "max_target_length, max_new_tokens": (target, positions(model, "decoder")),
            }
        else:
            names = "max_source_length + max_target_length or max_new_tokens"
            needed = {names: (self.max_source_length + target, positions(model, "decoder"))}
        for names, (length, most) in needed.items():
            if length > most:
                raise InputError(
                    f"{names}: {length} is more than the model's max_position_embeddings of {most}"
                )


def positions(model: "transformers.PreTrainedModel", part: str) -> float:
    """Of tokens in the "encoder" or the "decoder"; where there is no limit (T5) infinitely many."""
    of_two = getattr(model, part, model)  # each of a model made of two has its own
    for name in (f"max_{part}_position_embeddings", "max_position_embeddings"):
        if getattr(of_two.config, name, None) is not None:
            return getattr(of_two.config, name) - first_position(of_two)
    return math.inf


def check_ids(
    examples: list[Example], model: "transformers.PreTrainedModel", is_encoder_decoder: bool
) -> None:
    """Raises InputError for a token that the model does not have."""
    sizes = [model.get_input_embeddings().num_embeddings]
    sizes.append(model.get_output_embeddings().weight.shape[0] if is_encoder_decoder else sizes[0])
    for example in examples:
        ids, length = example["input_ids"], example["source_length"]
        for part, size in zip((ids[:length], ids[length:]), sizes, strict=True):
            if part.max(initial=0) >= size:
                raise InputError(
                    f"tokenizer: token {part.max()} is beyond the model's {size} embeddings: this "
                    "is not the model's tokenizer"
                )


def own_prefix(config: Any, arguments: PairArguments, task: str) -> str:
    """source_prefix; where it is null, what the given model's task_specific_params have for such a
    task. Those of the export then have it."""
    known = getattr(config, "task_specific_params", None) or {}
    prefix = arguments.source_prefix
    if prefix is None:
        prefix = (known.get(task) or {}).get("prefix", "")
    if config.is_encoder_decoder and (known or prefix):
        config.task_specific_params = {task: {"prefix": prefix}}
    return prefix


class Pair(NamedTuple):
    source: str
    target: str
    place: str = ""  # where it was read
    table: str = ""  # the same, as the logs call it


def read_pairs(tables: list[Table], columns: PairArguments) -> list[Pair]:
    """All pairs of the tables. Raises InputError for a missing column or an empty text."""
    return [
        Pair(*map(row.text, (columns.source_column, columns.target_column)), row.place, row.table)
        for table in tables
        for row in read_table(table)
    ]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, arguments: PairArguments) -> None:
    """Tell the tokenizer of the languages and the longest source, as the export will know them.

    Raises:
        InputError: it has no end token; a language that it does not know, or that it wants.
    """
    a, kind = arguments, type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise InputError("tokenizer: it has no eos_token, which ends a target")
    known, saved = languages(tokenizer), tokenizer.init_kwargs
    codes = {"source_lang": a.source_lang, "target_lang": a.target_lang}
    if known and codes == dict.fromkeys(codes):
        codes = {"source_lang": saved.get("src_lang"), "target_lang": saved.get("tgt_lang")}
    for name, code in codes.items():
        if known and code is None and tokenizer.src_lang is not None:
            raise InputError(
                f"{name}: {kind} needs one of its languages: {', '.join(known[:9])}, …"
            )
        if code is not None and not known:
            raise InputError(f"{name}: {kind} knows no languages: leave it out")
        if code is not None and not {code, f"__{code}__"} & {*known}:  # as PLBart writes them
            (near,) = get_close_matches(code, known, 1, 0)
            raise InputError(f"{name}: {kind} knows no {code!r}: the nearest language is {near!r}")
    if known and None not in codes.values():
        tokenizer.src_lang, tokenizer.tgt_lang = codes.values()
        # what `save_pretrained` writes of it
        saved |= {"src_lang": tokenizer.src_lang, "tgt_lang": tokenizer.tgt_lang}


def languages(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The codes between which a tokenizer switches its special tokens; [] of most tokenizers."""
    if not isinstance(getattr(type(tokenizer), "src_lang", None), property):
        return []
    # NLLB has no such table
    return list(getattr(tokenizer, "lang_code_to_id", None) or tokenizer.extra_special_tokens)


def decoder_inputs(model: "transformers.PreTrainedModel", labels: torch.Tensor) -> torch.Tensor:
    """What the decoder reads where it is to write the labels, as the model's own forward makes it.

    Raises:
        InputError: it does not make it of labels.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own(labels=labels)
    shift = getattr(sys.modules[type(model).__module__], "shift_tokens_right", None)
    if shift is None:
        raise InputError(f"model: {model.config.model_type} makes no decoder inputs of labels")
    return shift(labels, model.config.pad_token_id, model.config.decoder_start_token_id)


class PairEncoder:
    """Pairs → token ids.

    An encoder-decoder reads source and target as `tokenizer(source, text_target=target)` has them,
    special tokens included. For a decoder alone the target follows the prompt, without a special
    token between them. A target to which the tokenizer adds no end gets one. Special tokens that
    are spelled out in a text are read as the tokenizer does by itself (`split_special_tokens`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: PairArguments, config: Any):
        self.tokenizer, self.arguments = tokenizer, arguments
        self.is_encoder_decoder = config.is_encoder_decoder
        self.prefix = arguments.source_prefix or ""
        self.cut_sources = self.cut_targets = 0
        # a target, and what the tokenizer puts before and after the tokens of its text
        plain = tokenizer(text_target="a", add_special_tokens=False)["input_ids"]
        self.target = tokenizer(text_target="a")["input_ids"]
        places = range(len(self.target))
        start = next((i for i in places if self.target[i:][: len(plain)] == plain), 0)
        self.opening, self.closing = self.target[:start], self.target[start + len(plain) :]
        self.adds_end = tokenizer.eos_token_id in self.closing

    def __call__(self, pairs: Sequence[Pair]) -> list[Example]:
        """
        Returns:
            Of each pair `input_ids`, source and target, `source_length`, the tokens of the source
            among them, and its `table`. Those that were cut are counted.
        """
        examples: list[Example] = []
        for _, batch in in_batches(pairs, "pairs"):
            sources = self._sources([pair.source for pair in batch])
            targets = self._targets([pair.target for pair in batch])
            for pair, source, target in zip(batch, sources, targets, strict=True):
                tokens = np.array(source + target, np.int32)
                own = {"source_length": len(source), "table": pair.table}
                examples.append({"input_ids": tokens, **own})
        return examples

    def _sources(self, texts: list[str]) -> list[list[int]]:
        a = self.arguments
        beginnings = [self.prefix + text for text in texts]
        if self.is_encoder_decoder:
            rows, cut = self._cut(a.max_source_length, beginnings)
            self.cut_sources += cut
            return rows
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
            added = [] if self.adds_end else [end]
            rows, cut = self._cut(most - len(added), text_target=texts)
            self.cut_targets += cut
            return [row + added for row in rows]
        rows = self._without_end(self._encode(texts, add_special_tokens=False))
        self.cut_targets += sum(len(row) >= most for row in rows)
        return [[*row[: most - 1], end] for row in rows]

    def _cut(self, most: int, *texts: list[str], **named: list[str]) -> tuple[list[list[int]], int]:
        """Rows of at most so many tokens, the special ones whole; and how many texts were cut."""
        encoded = self.tokenizer(*texts, **named, truncation=True, max_length=most, verbose=False)
        if encoded.encodings is None:  # a slow tokenizer does not say what it cut
            whole = self.tokenizer(*texts, **named, verbose=False)["input_ids"]
            return encoded["input_ids"], sum(len(row) > most for row in whole)
        return encoded["input_ids"], sum(bool(row.overflowing) for row in encoded.encodings)

    def _without_end(self, rows: list[list[int]]) -> list[list[int]]:
        """Without the end token that some tokenizers add to every text."""
        end = self.tokenizer.eos_token_id
        return [row[:-1] if row[-1:] == [end] else row for row in rows]

    def _encode(self, texts: list[str], **options: Any) -> list[list[int]]:
        return self.tokenizer(texts, verbose=False, **options)["input_ids"]

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
