"""The steps of a finite set of examples, epoch after epoch, for any number of ranks.

A step is a function of (data, seed, its number): a resume needs no state at all.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from utils.batching import Rows, deal
from utils.finetuning_arguments import FinetuningArguments
from utils.randomness import Draws
from utils.stream import Step

Example = dict[str, Any]  # features by name; `input_ids` is a sequence of token ids


class Epochs:
    """What `Training` trains on: each epoch a permutation of the examples, keyed by the seed.

    Args:
        count: of the examples.
        make: (indices, epoch) → the examples.
        collate: (examples of each row) → a batch; a row without examples is all padding.
        fingerprint: what must not change over the life of a run, by name.
        packing: several examples a row.
    """

    def __init__(
        self,
        count: int,
        make: Callable[[list[int], int], Sequence[Example]],
        collate: Callable[[list[list[Example]]], dict[str, torch.Tensor]],
        fingerprint: dict[str, Any],
        arguments: FinetuningArguments,
        packing: bool = False,
    ):
        self.count, self.make, self.collate = count, make, collate
        self.arguments, self.packing = arguments, packing
        self._fingerprint = fingerprint

    def fingerprint(self) -> dict[str, Any]:
        return self._fingerprint

    def steps(self, rank: int, world_size: int, step: int, states: dict) -> Iterator[Step]:
        a = self.arguments
        budget = a.per_device_batch_size * a.sequence_length
        steps_per_epoch = math.ceil(self.count / a.global_batch_size)
        epoch, order = -1, []
        while True:
            if epoch != (epoch := step // steps_per_epoch):
                order = Draws(a.seed, "epoch", epoch).permutation(self.count)
            start = step % steps_per_epoch * a.global_batch_size
            examples = self.make(order[start : start + a.global_batch_size], epoch)
            lengths = [len(example["input_ids"]) for example in examples]
            mine: list[Rows] = deal(lengths, budget, world_size, self.packing)[rank]
            batches = [
                self.collate([[examples[index] for index in row] for row in rows]) for rows in mine
            ]
            tokens = sum(lengths[index] for rows in mine for row in rows for index in row)
            yield Step(batches, tokens, {})
            step += 1


def digest(parts: Iterator[Any]) -> str:
    """Of what can be written as text, for comparing the data of two runs."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(repr(part).encode("utf-8", "surrogatepass") + b"\n")
    return state.hexdigest()
