"""A teacher's cache of conversations: one by one, in the order of the data.

    teacher_cache/cache.json  lane-00000/rows-000000000.parquet …

How they are drawn, packed or padded changes nothing of it, nor does the number of epochs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import conversations
from cache_shards import SHARD_ROWS, count_rows, read_row, shard
from utils.config import InputError
from utils.epochs import digest
from utils.loss import IGNORE_INDEX
from utils.stream import Row


class ConversationCache:
    """
    Args:
        arguments: `CacheArguments`, and those of conversations.
        depends_on: what the examples depend on, by name.
        examples: as `to_examples` gives them; each is given its `number`.
    """

    packing = False  # of what the teacher is asked

    def __init__(self, arguments: Any, depends_on: dict[str, Any], examples: list[dict[str, Any]]):
        self.folder, self.top_k = Path(arguments.teacher_cache), arguments.cache_top_k
        self.examples = examples
        for number, example in enumerate(examples):
            example["number"] = number
        # what of them is read and learnt, whatever settings made it so
        parts = (e[name].tobytes() for e in examples for name in ("input_ids", "shift_labels"))
        self.depends_on = depends_on | {"corpus": digest(parts)}

    def check_complete(self) -> None:
        """Raises InputError where it is cut short."""
        if missing := self.count_missing():
            raise InputError(
                f"teacher_cache: {self.folder} is cut short: it lacks {missing:,} of "
                f"{len(self.examples):,} conversations: write the rest with "
                "--write_teacher_cache"
            )

    def collate(self, rows: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        """As that of conversations, with the likeliest tokens at each target."""
        batch = conversations.collate(rows)
        is_target = batch["shift_labels"].numpy() != IGNORE_INDEX
        tops = [self._tops(example) for row in rows for example in row]
        for name, dtype in (("top_ids", np.int32), ("top_log_probabilities", np.float32)):
            values = np.zeros((*is_target.shape, self.top_k), dtype)
            if tops:
                values[is_target] = np.concatenate([top[name] for top in tops])
            batch[name] = torch.from_numpy(values)
        return batch

    def _tops(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        first = example["number"] // SHARD_ROWS * SHARD_ROWS
        values = read_row(shard(self.folder, 0, first), example["number"] - first)
        return {name: column.reshape(-1, self.top_k) for name, column in values.items()}

    @staticmethod
    def batch(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """What the teacher is asked: each alone in its row."""
        return conversations.collate([[row] for row in rows])

    def missing(self, rank: int, world_size: int) -> Iterator[tuple[Path, list[Row]]]:
        """(the file, its rows) of the shards that are not there yet and that the rank writes."""
        for first in range(rank * SHARD_ROWS, len(self.examples), world_size * SHARD_ROWS):
            path, part = shard(self.folder, 0, first), self.examples[first:][:SHARD_ROWS]
            if not path.exists() or count_rows(path) != len(part):
                yield path, [_row(example) for example in part]

    def count_missing(self) -> int:
        held = (shard(self.folder, 0, x) for x in range(0, len(self.examples), SHARD_ROWS))
        return len(self.examples) - sum(count_rows(path) for path in held if path.exists())

    def close(self) -> None:
        """There are no files open."""


def _row(example: dict[str, Any]) -> Row:
    size = len(example["input_ids"])
    features = {name: example[name] for name in ("input_ids", "shift_labels")}
    features |= {"position_ids": np.arange(size, dtype=np.int32), "lengths": np.int32(size)}
    return Row(0, features, {"seen": []}, size)
