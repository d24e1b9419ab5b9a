"""A teacher's likeliest tokens, written once and streamed as often as wanted.

The cache is the stream as it was: each lane's rows in their order, with the state of the lane after
each, and at each target the k likeliest tokens with their log-probabilities, in float16; what is
left of the probability is one more place. A run that reads it has the batches of a run beside the
teacher, on any number of processes, and its state is the number of a row.

    teacher_cache/cache.json  lane-00000/rows-000000000.parquet …
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from cache_shards import (
    FEATURES,
    SHARD_ROWS,
    read_shard,
    shard,
    shards,
    state_after,
    write_shard,
)
from causal_head import CausalHead, check_model
from packing import DocumentEncoder, packed_rows
from utils.config import InputError, Settings
from utils.divergences import Logits, TopTokens, chunk_rows
from utils.files import written_aside
from utils.integrity import checksum
from utils.lanes import Corpus, Lanes
from utils.loss import IGNORE_INDEX
from utils.program import announced, say
from utils.progress import progress_bar
from utils.run_folder import RunFolder
from utils.stream import Row, collate
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
        if self.teacher_cache is not None:
            if self.hidden_weight:
                raise InputError(
                    "hidden_weight: a teacher_cache holds no hidden states: leave it 0"
                )
            if self.total_steps is None:
                raise InputError("teacher_cache: say how long the run is: max_steps or max_tokens")
        super().check()

    def fixed(self) -> dict[str, Any]:
        is_cached = self.teacher_cache is not None
        return super().fixed() | ({"cache_top_k": self.cache_top_k} if is_cached else {})

    @property
    def rows_of_a_lane(self) -> int:
        return self.total_steps * self.global_batch_size // self.lanes


def fingerprint(arguments: Any, corpus: Corpus, encode: DocumentEncoder) -> dict[str, Any]:
    """What a cache depends on, by name; a teacher in a folder by its files' checksums."""
    a, teacher = arguments, asdict(arguments.teacher)
    for name in ("model_name_or_path", "adapter_name_or_path"):
        folder = Path(teacher[name] or "")
        if teacher[name] and folder.is_dir():
            files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
            teacher[name] = {file.name: checksum(file) for file in files}
    names = ("sequence_length", "packing", "temperature", "seed", "mixed_precision", "cache_top_k")
    found = {
        "teacher": teacher,
        "tokenizer": encode.fingerprint(),
        "corpus": corpus.fingerprint(),
        **{name: getattr(a, name) for name in names},
    }
    return json.loads(json.dumps(found))


class TeacherCache:
    """A cache to read, checked against the run.

    Raises:
        InputError: none there, of another teacher, tokenizer, corpus or setting, or cut short.
    """

    def __init__(self, arguments: Any, expected: dict[str, Any]):
        self.folder, self.top_k = Path(arguments.teacher_cache), arguments.cache_top_k
        was = _read_manifest(self.folder)
        if was is None:
            raise InputError(
                f"teacher_cache: there is none in {self.folder}: write it with the same settings "
                "and --write_teacher_cache true"
            )
        _check_same(self.folder, was, expected)
        wanted = arguments.rows_of_a_lane
        with announced(f"looking at {self.folder}"):
            for lane in range(arguments.lanes):
                held = sum(rows for _, rows in shards(self.folder, lane))
                if held < wanted:
                    raise InputError(
                        f"teacher_cache: {self.folder} is cut short: lane {lane} has {held:,} rows "
                        f"of {wanted:,}: write the rest with --write_teacher_cache true"
                    )

    def rows(self, lane: int, state: dict[str, Any] | None) -> Iterator[Row]:
        """Of one lane, as `packed_rows` gives them, from the row on that the state tells."""
        number = 0 if state is None else state["row"]
        for first, count in shards(self.folder, lane):
            if first + count <= number:
                continue
            for values in read_shard(shard(self.folder, lane, first), number - first):
                number += 1
                yield self._row(lane, number, values)
        raise InputError(f"teacher_cache: {self.folder} ends within the run", one_rank=True)

    def _row(self, lane: int, number: int, values: dict[str, Any]) -> Row:
        features = {name: values[name] for name in FEATURES}
        is_target = features["shift_labels"] != IGNORE_INDEX
        shape = (len(is_target), self.top_k)
        ids, log_probabilities = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        ids[is_target] = values["top_ids"].reshape(-1, self.top_k)
        log_probabilities[is_target] = values["top_log_probabilities"].reshape(-1, self.top_k)
        features |= {"lengths": np.int32(values["lengths"]), "top_ids": ids}
        features["top_log_probabilities"] = log_probabilities
        state = {"row": number, "seen": json.loads(values["seen"])}
        return Row(lane, features, state, values["tokens"])


def write_cache(arguments: Any, of_teacher: Any, tokenizer: Any) -> None:
    """One pass of the teacher over the stream of a run; started again, it goes on."""
    a = arguments
    vocabulary = of_teacher.get_text_config().vocab_size
    if a.cache_top_k > vocabulary:
        raise InputError(
            f"cache_top_k: {a.cache_top_k} is more than the teacher's {vocabulary} tokens"
        )
    encode, corpus = DocumentEncoder(tokenizer), Corpus(a)
    expected = fingerprint(a, corpus, encode)
    folder = RunFolder(a.teacher_cache)
    was = _read_manifest(folder.path)
    if was is not None:
        _check_same(folder.path, was, expected)
    training = Training(a, folder)
    ranks = training.ranks
    teacher = load_teacher(a, of_teacher, transformers.AutoModelForCausalLM, training.accelerator)
    head = CausalHead(teacher)
    head.router_weight = 0.0
    with of_the_teacher():
        losses = partial(_losses, training, head, a.packing)
        check_model(teacher, losses, a.sequence_length, a.packing)
    with ranks.together():
        if ranks.is_main and was is None:
            folder.path.mkdir(parents=True, exist_ok=True)
            with written_aside(folder.path / MANIFEST) as aside:
                aside.write_text(json.dumps(expected, indent=1))
    lanes = Lanes(corpus, encode)
    rows_of = partial(packed_rows, lanes, a.sequence_length, packing=a.packing)
    mine = range(ranks.rank, a.lanes, ranks.world_size)
    pending = (part for lane in mine for part in _missing(folder.path, lane, rows_of, a))
    total = sum(_count_missing(folder.path, lane, a) for lane in range(a.lanes))
    say(f"{total:,} rows of {a.sequence_length:,} tokens to be written to {folder.path}")
    size = tokens = 0
    with progress_bar(total, "asking the teacher", "rows") as bar:
        while True:
            path, rows = next(pending, (None, []))
            if not ranks.any_rank(path is not None):
                break
            counts = ranks.gather([math.ceil(len(rows) / a.per_device_batch_size)])
            tops = _ask(training, head, rows, a, max(counts))
            if ranks.stopped:
                break
            with ranks.together():
                if path is not None:
                    size += write_shard(path, rows, tops)
            tokens += sum(len(ids) for ids, _ in tops)
            bar.update(sum(ranks.gather([len(rows)])))
    lanes.close()
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
    training: Training, head: CausalHead, rows: list[Row], arguments: Any, count: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, log-probabilities) at the targets of each row; every rank asks `count` times."""
    a, device = arguments, training.accelerator.device
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for number in range(count):
        training.ranks.any_rank(False)  # hears of a signal to any of them
        if training.ranks.stopped:
            return []
        part = rows[number * a.per_device_batch_size :][: a.per_device_batch_size]
        features = [row.features for row in part] or [_no_row(a.sequence_length)]
        batch = {name: values.to(device) for name, values in collate(features).items()}
        places = batch["position_ids"] if a.packing else None
        with torch.no_grad(), training.accelerator.autocast():
            hidden, _ = head.hidden_states(batch["input_ids"], places, batch["lengths"])
            is_target = batch["shift_labels"] != IGNORE_INDEX
            logits = head.logits(hidden[is_target])
            with whole(*logits[1:3]):
                top = top_tokens(logits, a.cache_top_k, a.temperature)
        ids, kept = (values.cpu().numpy() for values in top)
        ends = is_target[: len(part)].sum(1).cumsum(0).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            found.append((ids[start:end], kept[start:end].astype(np.float16)))
    return found


def top_tokens(logits: Logits, k: int, temperature: float) -> TopTokens:
    """The k likeliest tokens of each row and their log-probabilities, the likeliest first."""
    size, parts = chunk_rows(logits.vocabulary, logits.cap), []
    for start in range(0, len(logits.hidden), size):
        chunk = logits.rows(slice(start, start + size)).div_(temperature)
        values, ids = chunk.topk(k)
        parts.append((ids, values - chunk.logsumexp(1, keepdim=True)))
    if not parts:
        return TopTokens(logits.hidden.new_zeros(0, k).long(), logits.hidden.new_zeros(0, k))
    return TopTokens(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _no_row(length: int) -> dict[str, np.ndarray]:
    zeros = np.zeros(length, np.int32)
    nothing = {"shift_labels": zeros + IGNORE_INDEX, "lengths": np.int32(0)}
    return {"input_ids": zeros, "position_ids": np.arange(length, dtype=np.int32), **nothing}


def _missing(
    folder: Path, lane: int, rows_of: Any, arguments: Any
) -> Iterator[tuple[Path, list[Row]]]:
    """(the file, its rows) of the shards of a lane that are not there yet."""
    wanted = arguments.rows_of_a_lane
    state, held = None, 0
    for first, count in shards(folder, lane):
        if first != held or (count < SHARD_ROWS and first + count < wanted):
            break  # a shorter run ended here: this shard is written again
        held = first + count
        state = state_after(shard(folder, lane, first))
    rows = rows_of(lane, state)
    while held < wanted:
        part = [next(rows) for _ in range(min(SHARD_ROWS, wanted - held))]
        yield shard(folder, lane, held), part
        held += len(part)


def _count_missing(folder: Path, lane: int, arguments: Any) -> int:
    return max(0, arguments.rows_of_a_lane - sum(count for _, count in shards(folder, lane)))


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
