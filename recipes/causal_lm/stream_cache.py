"""A teacher's cache of a stream of text: the rows of each lane in their order.

    teacher_cache/cache.json  lane-00000/rows-000000000.parquet …

A row has the state of its lane after it, so that writing goes on where it was stopped. A run that
reads it has the batches of a run beside the teacher, on any number of processes; its state is the
number of a row.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache_shards import FEATURES, SHARD_ROWS, read_shard, shard, shards, state_after
from utils.config import InputError
from utils.lanes import Lanes
from utils.loss import IGNORE_INDEX
from utils.program import announced
from utils.stream import Row, collate


class StreamCache:
    """
    Args:
        arguments: `CacheArguments`, and those of a stream.
        depends_on: what the rows depend on, by name.
        lanes: whose files are closed when all is written.
        rows_of: (lane, state) → the rows of the lane from there on.
    """

    def __init__(self, arguments: Any, depends_on: dict[str, Any], lanes: Lanes, rows_of: Callable):
        self.folder, self.top_k = Path(arguments.teacher_cache), arguments.cache_top_k
        self.lanes, self.rows_of, self.packing = arguments.lanes, rows_of, arguments.packing
        self.close = lanes.close
        self.wanted = arguments.total_steps * arguments.global_batch_size // self.lanes
        names = ("sequence_length", "packing", "seed")
        self.depends_on = depends_on | {name: getattr(arguments, name) for name in names}

    def check_complete(self) -> None:
        """Raises InputError where it is cut short."""
        with announced(f"looking at {self.folder}"):
            for lane in range(self.lanes):
                held = sum(rows for _, rows in shards(self.folder, lane))
                if held < self.wanted:
                    raise InputError(
                        f"teacher_cache: {self.folder} is cut short: lane {lane} has {held:,} rows "
                        f"of {self.wanted:,}: write the rest with --write_teacher_cache"
                    )

    def rows(self, lane: int, state: dict[str, Any] | None) -> Iterator[Row]:
        """Of one lane, as `rows_of` gives them, from the row on that the state tells."""
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

    @staticmethod
    def batch(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """What the teacher is asked."""
        return collate(rows)

    def missing(self, rank: int, world_size: int) -> Iterator[tuple[Path, list[Row]]]:
        """(the file, its rows) of the shards that are not there yet and that the rank writes."""
        for lane in range(rank, self.lanes, world_size):
            state, held = None, 0
            for first, count in shards(self.folder, lane):
                if first != held or (count < SHARD_ROWS and first + count < self.wanted):
                    break  # a shorter run ended here: this shard is written again
                held = first + count
                state = state_after(shard(self.folder, lane, first))
            rows = self.rows_of(lane, state)
            while held < self.wanted:
                part = [next(rows) for _ in range(min(SHARD_ROWS, self.wanted - held))]
                yield shard(self.folder, lane, held), part
                held += len(part)

    def count_missing(self) -> int:
        held = (sum(count for _, count in shards(self.folder, x)) for x in range(self.lanes))
        return sum(max(0, self.wanted - count) for count in held)
