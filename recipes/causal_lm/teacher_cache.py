"""A teacher's likeliest tokens, written once and read as often as wanted.

At each target the k likeliest tokens with their log-probabilities, in float16, from which what is
left of the probability follows.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers

from cache_shards import (
    write_shard,
)
from causal_head import CausalHead, check_model
from top_tokens import top_tokens
from utils.config import InputError, Settings
from utils.files import written_aside
from utils.integrity import checksum
from utils.loss import IGNORE_INDEX
from utils.program import say
from utils.progress import progress_bar
from utils.run_folder import RunFolder
from utils.stream import Row
from utils.teacher import load_teacher, of_the_teacher, whole
from utils.training import Training

MANIFEST = "cache.json"


@dataclass
class CacheArguments(Settings):
    """The teacher's part in a cache, so that it is computed once."""

    teacher_cache: str | None = None  # a folder; null: the teacher stands beside the student
    write_teacher_cache: bool = False  # write it, or what is missing of it, and train nothing
    cache_top_k: int = 32  # tokens that are kept at each position

    def check(self) -> None:
        if self.cache_top_k < 1:
            raise InputError(f"cache_top_k must be at least 1, not {self.cache_top_k}")
        if self.write_teacher_cache and self.teacher_cache is None:
            raise InputError("write_teacher_cache: name the folder: teacher_cache")
        if self.teacher_cache is not None and self.hidden_weight:
            raise InputError("hidden_weight: a teacher_cache holds no hidden states: leave it 0")
        super().check()

    def fixed(self) -> dict[str, Any]:
        is_cached = self.teacher_cache is not None
        return super().fixed() | ({"cache_top_k": self.cache_top_k} if is_cached else {})


class Cache(Protocol):
    """What is cached, and how the teacher is asked: `StreamCache` or `ConversationCache`."""

    depends_on: dict[str, Any]  # by name
    packing: bool

    def check_complete(self) -> None: ...

    def missing(self, rank: int, world_size: int) -> Iterator[tuple[Path, list[Row]]]: ...

    def count_missing(self) -> int: ...

    def batch(self, rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]: ...

    def close(self) -> None: ...


def fingerprint(arguments: Any, cache: "Cache") -> dict[str, Any]:
    """What a cache depends on, by name; a teacher in a folder by its files' checksums."""
    a, teacher = arguments, asdict(arguments.teacher)
    for name in ("model_name_or_path", "adapter_name_or_path"):
        folder = Path(teacher[name] or "")
        if teacher[name] and folder.is_dir():
            files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
            teacher[name] = {file.name: checksum(file) for file in files}
    names = ("temperature", "mixed_precision", "cache_top_k")
    settings = {name: getattr(a, name) for name in names}
    return json.loads(json.dumps({"teacher": teacher, **cache.depends_on, **settings}))


def check_cache(cache: Cache, arguments: Any) -> None:
    """
    Raises:
        InputError: none there, of another teacher, tokenizer, corpus or setting, or cut short.
    """
    folder = Path(arguments.teacher_cache)
    was = _read_manifest(folder)
    if was is None:
        raise InputError(
            f"teacher_cache: there is none in {folder}: write it with the same settings and "
            "--write_teacher_cache"
        )
    _check_same(folder, was, fingerprint(arguments, cache))
    cache.check_complete()


def write_cache(arguments: Any, of_teacher: Any, cache: Cache) -> None:
    """One pass of the teacher over what is missing; started again, it goes on."""
    a = arguments
    vocabulary = of_teacher.get_text_config().vocab_size
    if a.cache_top_k > vocabulary:
        raise InputError(
            f"cache_top_k: {a.cache_top_k} is more than the teacher's {vocabulary} tokens"
        )
    expected, folder = fingerprint(a, cache), RunFolder(a.teacher_cache)
    was = _read_manifest(folder.path)
    if was is not None:
        _check_same(folder.path, was, expected)
    training = Training(a, folder)
    ranks = training.ranks
    teacher = load_teacher(a, of_teacher, transformers.AutoModelForCausalLM, training.accelerator)
    head = CausalHead(teacher)
    head.router_weight = 0.0
    with of_the_teacher():
        losses = partial(_losses, training, head, cache.packing)
        check_model(teacher, losses, a.sequence_length, cache.packing)
    with ranks.together():
        if ranks.is_main and was is None:
            folder.path.mkdir(parents=True, exist_ok=True)
            with written_aside(folder.path / MANIFEST) as aside:
                aside.write_text(json.dumps(expected, indent=1))
    pending, total = cache.missing(ranks.rank, ranks.world_size), cache.count_missing()
    say(f"{total:,} rows to be written to {folder.path}")
    size = tokens = 0
    with progress_bar(total, "asking the teacher", "rows") as bar:
        while True:
            path, rows = next(pending, (None, []))
            if not ranks.any_rank(path is not None):
                break
            counts = ranks.gather([math.ceil(len(rows) / a.per_device_batch_size)])
            tops = _ask(training, head, cache, rows, a, max(counts))
            if ranks.stopped:
                break
            with ranks.together():
                if path is not None:
                    size += write_shard(path, rows, tops)
            tokens += sum(len(ids) for ids, _ in tops)
            bar.update(sum(ranks.gather([len(rows)])))
    cache.close()
    size, tokens = ranks.sum([size, tokens])
    if ranks.stopped:
        return training.stop()
    if tokens:
        say(f"{int(tokens):,} targets in {size / 1e6:,.1f} MB: {size / tokens:.1f} bytes a token")
    say(f"{folder.path} is complete")


def _losses(
    training: Training, head: CausalHead, packing: bool, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    device = training.accelerator.device
    ids, places, labels = (
        batch[k].to(device) for k in ("input_ids", "position_ids", "shift_labels")
    )
    with torch.no_grad(), training.accelerator.autocast():
        hidden, _ = head.hidden_states(ids, places if packing else None, None)
        with whole(*head.logits(hidden)[1:3]):
            return head.token_scores(hidden, labels)[0]


def _ask(
    training: Training, head: CausalHead, cache: Cache, rows: list[Row], arguments: Any, count: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, log-probabilities) at the targets of each row; every rank asks `count` times."""
    a, device = arguments, training.accelerator.device
    order = sorted(range(len(rows)), key=lambda i: rows[i].features["lengths"])  # less padding
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for number in range(count):
        training.ranks.any_rank(False)  # hears of a signal to any of them
        if training.ranks.stopped:
            return []
        part = order[number * a.per_device_batch_size :][: a.per_device_batch_size]
        features = [rows[index].features for index in part] or [_no_row(a.sequence_length)]
        batch = {name: values.to(device) for name, values in cache.batch(features).items()}
        places = batch["position_ids"] if cache.packing else None
        with torch.no_grad(), training.accelerator.autocast():
            hidden, _ = head.hidden_states(batch["input_ids"], places, batch["lengths"])
            is_target = batch["shift_labels"] != IGNORE_INDEX
            logits = head.logits(hidden[is_target])
            with whole(*logits[1:3]):
                top = top_tokens(logits, a.cache_top_k, a.temperature)
        ids, kept = (values.cpu().numpy() for values in top)
        ends = is_target[: len(part)].sum(1).cumsum(0).tolist()
        for index, start, end in zip(part, [0, *ends], ends, strict=False):
            found[index] = (ids[start:end], kept[start:end].astype(np.float16))
    return [found[index] for index in range(len(rows))]


def _no_row(length: int) -> dict[str, np.ndarray]:
    zeros = np.zeros(length, np.int32)
    nothing = {"shift_labels": zeros + IGNORE_INDEX, "lengths": np.int32(0)}
    return {"input_ids": zeros, "position_ids": np.arange(length, dtype=np.int32), **nothing}


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"teacher_cache: cannot read {folder / MANIFEST}: {error}") from None


def _check_same(folder: Path, was: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if was.get(name) != value:
            shown = "" if isinstance(value, dict) or name == "tokenizer" else f" ({was.get(name)})"
            raise InputError(
                f"teacher_cache: {folder} was written with another {name}{shown}: name another "
                "folder, or write it again"
            )
