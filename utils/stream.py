"""The rows of each step: a deterministic, elastic, resumable stream over the lanes of a corpus.

A step takes the same number of rows from every lane; rank r runs the lanes with
`lane % world_size == r`. So the global batch of a step depends on the data settings, the seed and
the step alone: not on the number of processes, of workers, of micro-batches, or of interruptions.
"""

import copy
import hashlib
import itertools
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from utils.config import InputError
from utils.engine import Step
from utils.lanes import Lanes
from utils.program import announced, say
from utils.ranks import Ranks, launched_world_size
from utils.sources import Source, SourceArguments


@dataclass
class StreamArguments(SourceArguments):
    """How documents become an order."""

    train_sources: list[Source] = field(default_factory=list)  # required
    # Independent streams that the corpus is dealt to. Divides global_batch_size and is a multiple
    # of the number of processes: 64 serves 1 to 64 GPUs by powers of two; 192 also 24, 48 and 96.
    # Null: as many as divide global_batch_size, up to 64 and to a quarter of the documents
    lanes: int | None = None
    shuffle_documents: int = 512  # a chunk of this many documents, or of …
    shuffle_bytes: int = 2**21  # … this many bytes, whichever comes first, is permuted
    # processes a rank that read and tokenize, as many as it has lanes at most; 0: its own thread
    dataloader_num_workers: int = 0

    def check(self) -> None:
        """Raises InputError when batch or processes do not fit the lanes."""
        if self.num_train_epochs is not None and self.num_train_epochs % 1:
            raise InputError(
                f"num_train_epochs: a stream has whole ones, not {self.num_train_epochs}"
            )
        if self.lanes is not None:
            self.check_lanes()
        super().check()

    def check_lanes(self) -> None:
        batch, processes = self.global_batch_size, launched_world_size()  # of TrainingArguments
        if self.lanes < 1 or batch % self.lanes:
            raise InputError(
                f"lanes: {self.lanes} do not fit: global_batch_size {batch} "
                "must be a multiple of lanes"
            )
        if self.lanes % processes:
            raise InputError(
                f"lanes: {self.lanes} cannot be dealt to {processes} processes: launch a number "
                f"that divides {self.lanes}, or begin a run with lanes "
                f"{math.lcm(self.lanes, processes)}"
            )


class TextEncoder:
    """Texts → encodings, in batches. Special tokens that stand in a text are read as plain text.

    Raises:
        InputError: the tokenizer is not a fast one, or has none of a special token that is needed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *needed: str, purpose: str):
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise InputError(f"{tokenizer.name_or_path}: streaming needs a fast tokenizer")
        for name in needed:
            if getattr(tokenizer, name) is None:
                raise InputError(
                    f"tokenizer: {tokenizer.name_or_path} has no {name}, which {purpose} needs"
                )
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.backend.encode_special_tokens = True  # which is not pickled with it

    def encode(self, texts: list[str]) -> list[Encoding]:
        return self.backend.encode_batch_fast(texts, add_special_tokens=False)

    def fingerprint(self) -> str:
        """Of all that the ids depend on."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()[:16]


class Row(NamedTuple):
    """One training sequence and the state of its lane once it has been trained on."""

    lane: int
    features: dict[str, np.ndarray]
    state: dict[str, Any]
    tokens: int  # of documents; what is left of the row is padding


class TrainingStream(torch.utils.data.IterableDataset):
    """The rows of each step: what `Training` trains on.

    Args:
        rows_of: (lane index, its state or None) → an endless iterator of its rows.
        arguments: a `TrainingArguments` that is a `StreamArguments` as well.
    """

    def __init__(
        self, lanes: Lanes, rows_of: Callable[[int, dict | None], Iterator[Row]], arguments: Any
    ):
        self.lanes, self.rows_of, self.arguments = lanes, rows_of, arguments
        self.lane_count = lanes.corpus.arguments.lanes
        self.states: dict[int, dict | None] = {}  # of the lanes that are read here
        say("\n".join(lanes.corpus.told))

    @property
    def files(self) -> list[str]:
        return [file for files in self.lanes.corpus.files for file in files]

    def fingerprint(self) -> dict[str, Any]:
        return {
            "the training data": self.lanes.corpus.fingerprint(),
            "the tokenizer": self.lanes.encode.fingerprint(),
        }

    def count_steps(self, ranks: Ranks) -> int | None:
        """Until num_train_epochs are spent, if they are set: a rank makes all rows of its lanes."""
        if self.arguments.num_train_epochs is None:
            return None
        rows, batch = 0, self.arguments.global_batch_size
        with announced("counting the steps: all data are read once", each_rank=True):
            for lane in range(ranks.rank, self.lane_count, ranks.world_size):
                found = itertools.takewhile(lambda row: row.tokens, self.rows_of(lane, None))
                rows = max(rows, sum(1 for _ in found))
        self.lanes.close()
        count = math.ceil(max(ranks.gather([rows])) * self.lane_count / batch)
        say(f"num_train_epochs {self.arguments.num_train_epochs:g}: steps {count:,}")
        return count

    def steps(self, rank: int, world_size: int, step: int, states: dict) -> Iterator[Step]:
        for rows in self.rows(rank, world_size, states):
            size = self.arguments.micro_batch_size(step)
            features = [row.features for row in rows]
            batches = [collate(features[i : i + size]) for i in range(0, len(rows), size)]
            states = {row.lane: row.state for row in rows}
            yield Step(batches, sum(row.tokens for row in rows), states)
            step += 1

    def rows(
        self, rank: int, world_size: int, states: dict[int, dict] | None = None
    ) -> Iterator[list[Row]]:
        """The rank's rows of one step after the other, in an order that workers do not change."""
        states, mine = states or {}, copy.copy(self)
        mine.states = {i: states.get(i) for i in range(rank, self.lane_count, world_size)}
        # a lane is read by one worker: with many ranks there are fewer lanes than workers
        workers = min(self.arguments.dataloader_num_workers, len(mine.states))
        loader = torch.utils.data.DataLoader(
            mine,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            multiprocessing_context="spawn" if workers else None,
        )
        of_children = signal.getsignal(signal.SIGCHLD)
        # what stops a run is sent to all its processes: the trainer still needs rows for its last
        # step, and what is blocked here is blocked in the workers, from their first moment on
        mask = {signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, mask)
        try:
            parts = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if signal.getsignal(signal.SIGCHLD) is not of_children:
            # that a worker has died is met where its rows are awaited, not anywhere in a step
            signal.signal(signal.SIGCHLD, of_children)
        try:
            while True:
                rows: list[Row] = []
                for _ in range(workers or 1):
                    try:
                        part = next(parts)
                    except RuntimeError as error:
                        if not str(error).startswith("DataLoader worker"):
                            raise
                        raise InputError(f"{error}: was it out of memory?", one_rank=True) from None
                    if isinstance(part, InputError):
                        raise part
                    rows += part
                yield sorted(rows, key=lambda row: row.lane)
        finally:
            del parts  # ends the workers; left to the garbage collector, they may hang

    def __iter__(self) -> Iterator[list[Row] | InputError]:
        """A step's rows of the lanes that this process, perhaps a worker, reads."""
        worker = torch.utils.data.get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        per_lane = self.arguments.global_batch_size // self.lane_count
        lanes = [self.rows_of(i, self.states[i]) for i in list(self.states)[first::stride]]
        try:
            while True:
                yield [next(lane) for lane in lanes for _ in range(per_lane)]
        except InputError as error:
            yield error  # raised in a worker, it would arrive with a traceback in its message
        finally:
            self.lanes.close()  # an open parquet reader at interpreter exit can abort the process


def collate(features: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Features of rows → a batch of tensors (rows, sequence_length, …), of int64 or float32."""
    batch = {}
    for name in features[0]:
        values = torch.from_numpy(np.stack([row[name] for row in features]))
        batch[name] = values if values.is_floating_point() else values.long()
    return batch


def _as_it_is(rows: list[Row]) -> list[Row]:
    return rows


def _start_worker(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker, one core
    os.setpgrp()
