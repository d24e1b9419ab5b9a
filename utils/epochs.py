"""The steps of a finite set of examples, epoch after epoch, for any number of ranks.

A step is a function of (data, seed, its number): a resume needs no state at all. It is a random set
of examples, where `group_by_length` of other trainers lets lengths decide which are trained on
together; how it is then cut and dealt by length changes nothing but the speed.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from textwrap import shorten
from typing import Any

import numpy as np
import torch

from utils.arguments import FinetuningArguments
from utils.config import InputError
from utils.engine import Step
from utils.files import find_local_files
from utils.program import say, warn
from utils.randomness import Draws
from utils.tables import KINDS

MICRO_BATCH_COST = 256  # tokens of padding that are cheaper than one more micro-batch

Rows = list[list[int]]  # of a micro-batch; each row the indices of its examples
Example = dict[str, Any]  # features by name; `input_ids` is a sequence of token ids


class Mixture:
    """The examples of all tables, of which an epoch sees `weight` x those of each, rounded.

    It goes on in a table where the epoch before it ended: in a random order, and from the end on in
    another. So none of a table is seen once more before all others were seen as often.

    Args:
        examples: each with the `table` that it is from, as its rows name it.
    """

    def __init__(self, examples: Sequence[Example], arguments: FinetuningArguments):
        self.examples, self.seed = examples, arguments.seed
        weights = {table.log_name: table.weight for table in arguments.trained_tables}
        of_tables: dict[str, list[int]] = {}
        for index, example in enumerate(examples):
            of_tables.setdefault(example.get("table", ""), []).append(index)
        self.tables = {name: np.array(indices) for name, indices in of_tables.items()}
        self.weights = {name: weights.get(name, 1.0) for name in self.tables}
        self.counts = {
            name: max(1, round(self.weights[name] * len(indices)))
            for name, indices in self.tables.items()
        }
        self.count = sum(self.counts.values())  # an epoch

    @property
    def facts(self) -> dict[str, str]:
        """For the card, where there are several tables or weights."""
        parts = [
            f"{name}: {len(indices):,} x {self.weights[name]:g} "
            f"({self.counts[name] / self.count:.1%} of an epoch)"
            for name, indices in self.tables.items()
        ]
        is_plain = len(parts) == 1 and self.count == len(self.examples)
        return {} if is_plain else {"examples by table": ", ".join(parts)}

    def epoch(self, number: int) -> np.ndarray:
        """(index, how often it was seen before) of the examples of an epoch in their order."""
        found = []
        for table, (name, indices) in enumerate(self.tables.items()):
            size, count = len(indices), self.counts[name]
            start, stop = number * count, (number + 1) * count
            for before in range(start // size, math.ceil(stop / size)):
                order = Draws(self.seed, "table", table, before).permutation(size)
                part = order[max(0, start - before * size) : stop - before * size]
                found += [np.stack([indices[part], np.full(len(part), before)], 1)]
        pairs = np.concatenate(found)
        pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
        return pairs[Draws(self.seed, "epoch", number).permutation(len(pairs))]


class Epochs:
    """What `Training` trains on: each epoch a permutation of its examples, keyed by the seed.

    Args:
        mixture: of the examples, and how often each is seen.
        collate: (examples of each row) → a batch; a row without examples is all padding.
        fingerprint: what must not change over the life of a run, by name.
        vary: (indices, how often each was seen before) → those examples as they are this time;
            null: always the same.
    """

    def __init__(
        self,
        mixture: Mixture,
        collate: Callable[[list[list[Example]]], dict[str, torch.Tensor]],
        fingerprint: dict[str, Any],
        arguments: FinetuningArguments,
        vary: Callable[[list[int], list[int]], Sequence[Example]] | None = None,
    ):
        self.mixture, self.collate, self.arguments = mixture, collate, arguments
        self.vary = vary or (lambda indices, seen: [mixture.examples[i] for i in indices])
        self._fingerprint = fingerprint
        say("\n".join(f"{name}: {fact}" for name, fact in mixture.facts.items()))

    @property
    def files(self) -> list[str]:
        tables = self.arguments.trained_tables
        return [file for table in tables for file in find_local_files(table.path, KINDS)]

    def fingerprint(self) -> dict[str, Any]:
        weights = [*self.mixture.weights.values()]
        own = {"the weights of the tables": weights} if {*weights} != {1.0} else {}
        return self._fingerprint | own

    def steps(self, rank: int, world_size: int, step: int, states: dict) -> Iterator[Step]:
        a = self.arguments
        budget = a.per_device_batch_size * a.row_length
        steps_per_epoch = math.ceil(self.mixture.count / a.global_batch_size)
        epoch, order = -1, np.zeros((0, 2), int)
        while True:
            if epoch != (epoch := step // steps_per_epoch):
                order = self.mixture.epoch(epoch)
            start = step % steps_per_epoch * a.global_batch_size
            examples = self.vary(*order[start : start + a.global_batch_size].T.tolist())
            lengths = [len(example["input_ids"]) for example in examples]
            mine: list[Rows] = deal(lengths, budget, world_size, a.packing)[rank]
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


def hold_out(
    parts: Sequence[list], given: Callable[[Any], Any], arguments: FinetuningArguments
) -> tuple[list[list], dict[str, str]]:
    """The rows of train, validation and test data, of which `validation_split` moves a part.

    A row goes by the hash of what the model is given of it. So the same rows are held out in any
    order, with any seed, and when others are added; and rows that are alike stay together.

    Args:
        given: of a row, its texts: rows in which they are equal are the same.

    Returns:
        The parts, and for the card how many of the held-out rows stand in the training data too.

    Raises:
        InputError: nothing left on one side; with on_leaked_rows "fail" rows on both sides.
    """
    train, validation, test = parts
    share = arguments.validation_split
    if share is not None:
        rows, train, validation = train, [], []
        for row in rows:
            is_held_out = int(digest([given(row)]), 16) < share * 2**64
            (validation if is_held_out else train).append(row)
        if not train or not validation:
            raise InputError(
                f"validation_split: {share} of {len(rows)} rows, by their hashes, leaves "
                f"{len(train)} to train on and {len(validation)} to validate on: give more rows, "
                "or validation_data"
            )
    seen, found = {digest([given(row)]) for row in train}, {}
    for name, rows in {"validation": validation, "test": test}.items():
        leaked = [row for row in rows if digest([given(row)]) in seen]
        if rows:
            found[name] = f"{len(leaked):,} of {len(rows):,} {name}"
        if leaked:
            first = shorten(str(given(leaked[0])), 80)
            message = f"{found[name]} rows stand in train_data too, the first: {first}"
            if arguments.on_leaked_rows == "fail":
                raise InputError(f"on_leaked_rows: {message}")
            warn(message)
    facts = {"rows that stand in train_data too": ", ".join(found.values())} if found else {}
    return [train, validation, test], facts


def deal(
    lengths: list[int], budget: int, world_size: int, packing: bool = False
) -> list[list[Rows]]:
    """The examples of a step → for each rank its micro-batches, as many for every rank.

    Where there are fewer examples than ranks, some get a row without examples.

    Args:
        lengths: of the examples, in tokens.
        budget: tokens of a micro-batch, padding included; not less than the longest example.
        packing: several examples a row, none longer than the longest example; else one.
    """
    rows = fit(lengths, max(lengths)) if packing else [[index] for index in range(len(lengths))]
    sizes = [sum(lengths[index] for index in row) for row in rows]
    groups = cut_by_length(sizes, budget)
    while len(groups) % world_size:
        longest = max(groups, key=len)
        if len(longest) < 2:
            groups.append([])
            continue
        groups.remove(longest)
        half = (len(longest) + 1) // 2
        groups += [longest[:half], longest[half:]]

    def cost(group: list[int]) -> int:
        return len(group) * max((sizes[index] for index in group), default=0)

    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    groups.sort(key=lambda group: (-cost(group), group))
    for start in range(0, len(groups), world_size):
        # the largest of the next ones to the rank that has the least so far
        idle = sorted(range(world_size), key=lambda rank: (loads[rank], rank))
        for rank, group in zip(idle, groups[start : start + world_size], strict=True):
            ranks[rank].append(group)
            loads[rank] += cost(group)
    return [[[rows[index] for index in group] or [[]] for group in rank] for rank in ranks]


def fit(lengths: list[int], room: int) -> Rows:
    """Best fit: the longest first, each into the row where it leaves the least; rows by index."""
    rows: Rows = []
    rooms = np.zeros(0, np.int64)
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        left = np.where(rooms >= lengths[index], rooms, room + 1)
        if len(rooms) == 0 or left.min() > room:
            rooms = np.append(rooms, room - lengths[index])
            rows.append([index])
        else:
            best = int(left.argmin())
            rooms[best] -= lengths[index]
            rows[best].append(index)
    return sorted(sorted(row) for row in rows)


def cut_by_length(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of similar lengths, the longest first: Σ (rows x the longest + overhead) is least.

    Args:
        budget: of a group, padding included; a longer one comes alone.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    sizes = np.array([lengths[index] for index in order])
    cheapest, previous = np.zeros(len(order) + 1), [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        # a group that ends here has at most so many rows, whatever its longest
        count = min(end, max(1, budget // max(1, int(sizes[end - 1]))))
        start = end - count
        padded = np.arange(count, 0, -1) * sizes[start:end]
        is_allowed = padded <= budget
        is_allowed[-1] = True
        costs = np.where(is_allowed, cheapest[start:end] + padded + MICRO_BATCH_COST, np.inf)
        previous[end] = start + int(costs.argmin())
        cheapest[end] = costs.min()
    groups, end = [], len(order)
    while end:
        groups.append(order[previous[end] : end])
        end = previous[end]
    return groups[::-1]
