"""The steps of a finite set, and their layout: each example once, as cheap as can be, any ranks."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from utils import epochs
from utils.arguments import FinetuningArguments
from utils.config import InputError
from utils.epochs import MICRO_BATCH_COST, Epochs, Mixture, cut_by_length, deal, digest, fit
from utils.randomness import Draws
from utils.tables import Table

COUNT, BATCH = 103, 10


def data(**settings) -> Epochs:
    examples = [{"input_ids": np.full(1 + i % 17, i), "index": i} for i in range(COUNT)]
    arguments = FinetuningArguments(
        train_data=[Table("x.csv")],
        global_batch_size=BATCH,
        per_device_batch_size=2,
        sequence_length=20,
        **settings,
    )
    return epochs_of(examples, arguments)


def epochs_of(examples: list[dict], arguments: FinetuningArguments) -> Epochs:
    return Epochs(
        Mixture(examples, arguments),
        lambda rows: {"indices": torch.tensor([[e["index"] for e in row] for row in rows if row])},
        {"the training data": "x"},
        arguments,
    )


def indices_of(steps: list) -> list[int]:
    return sorted(i for step in steps for batch in step.batches for i in batch["indices"].flatten())


def take(world_size: int, count: int, step: int = 0, **settings) -> list[list[int]]:
    """The examples of each step, over all ranks."""
    ranks = [data(**settings).steps(rank, world_size, step, {}) for rank in range(world_size)]
    return [indices_of([next(rank) for rank in ranks]) for _ in range(count)]


def test_every_example_once_an_epoch_in_another_order():
    steps = take(1, 22)
    first, second = steps[:11], steps[11:]
    for epoch in (first, second):
        assert sorted(itertools.chain(*epoch)) == list(range(COUNT))
        assert [len(step) for step in epoch] == [BATCH] * 10 + [3]
    assert first != second
    assert take(1, 11, seed=1) != first


def test_ranks_and_resumes_do_not_change_a_step():
    expected = take(1, 25)
    for world_size in (2, 3, 8):
        assert take(world_size, 25) == expected
    for step in (1, 10, 11, 24):
        assert take(2, 25 - step, step=step) == expected[step:]


WEIGHTS = {"a": 0.25, "b": 1.0, "c": 2.5}


def weighted(weights: dict[str, float] = WEIGHTS, **settings) -> Epochs:
    """Of 40, 13 and 10 examples, the tables in turn as long as they last."""
    sizes = {"a": 40, "b": 13, "c": 10}
    order = sorted((place, table) for table, size in sizes.items() for place in range(size))
    examples = [
        {"input_ids": np.full(1 + i % 17, i), "index": i, "table": table}
        for i, (_, table) in enumerate(order)
    ]
    arguments = FinetuningArguments(
        train_data=[Table(f"{name}.csv", label=name, weight=w) for name, w in weights.items()],
        **{"global_batch_size": 6, "per_device_batch_size": 2, "sequence_length": 20} | settings,
    )
    return epochs_of(examples, arguments)


def seen_of(steps: list[list[int]]) -> dict[str, list[int]]:
    """How often each example of each table is in the steps."""
    seen = Counter(map(int, itertools.chain(*steps)))
    found: dict[str, list[int]] = {}
    for example in weighted().mixture.examples:
        found.setdefault(example["table"], []).append(seen[example["index"]])
    return found


def take_weighted(world_size: int, count: int, step: int = 0, **settings) -> list[list[int]]:
    ranks = [weighted(**settings).steps(rank, world_size, step, {}) for rank in range(world_size)]
    return [indices_of([next(rank) for rank in ranks]) for _ in range(count)]


def test_rows_of_a_table_are_seen_as_often_as_it_weighs():
    steps_per_epoch = 8  # of 10 + 13 + 25 examples
    assert weighted().mixture.count == 6 * steps_per_epoch
    steps = take_weighted(1, 4 * steps_per_epoch)
    assert seen_of(steps) == {"a": [1] * 40, "b": [4] * 13, "c": [10] * 10}
    for start in range(0, len(steps), steps_per_epoch):
        seen = seen_of(steps[start : start + steps_per_epoch])
        assert sum(seen["a"]) == 10
        assert seen["b"] == [1] * 13
        assert {*seen["c"]} == {2, 3}
        assert sum(seen["c"]) == 25
    assert seen_of(steps[:16])["c"] == [5] * 10


def test_a_mixture_does_not_depend_on_ranks_micro_batches_resumes_and_names():
    expected = take_weighted(1, 20)
    for size in (1, 6):
        assert take_weighted(2, 20, per_device_batch_size=size) == expected
    for step in (3, 8, 13):
        assert take_weighted(2, 20 - step, step=step) == expected[step:]
    assert take_weighted(1, 20, seed=1) != expected


def test_an_example_is_told_how_often_it_was_seen_before():
    found = np.concatenate([weighted().mixture.epoch(number) for number in range(4)])
    counts = Counter(index for index, _ in found.tolist())
    expected = {(index, time) for index, count in counts.items() for time in range(count)}
    assert {*map(tuple, found.tolist())} == expected
    assert len(found) == len(expected)


def test_tables_of_weight_1_are_one_permutation():
    for tables in ({}, dict.fromkeys("abc", 1.0)):
        mixture = weighted(tables or {"x": 1.0}, seed=3).mixture
        for number in (0, 2):
            indices, seen = mixture.epoch(number).T.tolist()
            assert indices == Draws(3, "epoch", number).permutation(63)
            assert seen == [number] * 63


def test_a_weight_is_fixed_and_told():
    data = weighted()
    assert data.fingerprint() == {
        "the training data": "x",
        "the weights of the tables": [0.25, 1.0, 2.5],
    }
    (told,) = data.mixture.facts.values()
    assert told.startswith("a: 40 x 0.25 (20.8% of an epoch), b: 13 x 1 (27.1% of an epoch), c: ")
    assert weighted({"x": 1.0}).fingerprint() == {"the training data": "x"}


@pytest.mark.parametrize(
    ("name", "tables", "message"),
    [
        ("train_data", [Table("x.csv", weight=0)], "weight of x.csv: 0 is not more than 0: leave"),
        ("train_data", [Table("x.csv", weight=math.nan)], "weight of x.csv: nan is not more"),
        (
            "train_data",
            [Table("x.csv", weight=2), Table("x.csv", split="train[:9]")],
            "weight of x.csv: two tables are called x.csv, with 2 and 1: give each a label",
        ),
        ("validation_data", [Table("x.csv", weight=2)], "validation_data: weight of x.csv: each"),
        ("test_data", [Table("x.csv", weight=0.5)], "test_data: weight of x.csv: each row is"),
    ],
)
def test_weights_that_make_no_mixture(name, tables, message):
    arguments = FinetuningArguments(**{"train_data": [Table("y.csv")], name: tables})
    with pytest.raises(InputError) as error:
        arguments.check()
    assert str(error.value).startswith(message)


def test_tokens_are_those_of_the_examples():
    step = next(data().steps(0, 1, 0, {}))
    assert step.tokens == sum(1 + i % 17 for i in indices_of([step]))


def test_the_length_of_a_run_follows_from_its_epochs():
    arguments = data(num_train_epochs=2.5, warmup_ratio=0.1).arguments
    arguments = arguments.for_examples(COUNT)
    assert arguments.max_steps == 28  # 2.5 x 11, rounded up
    assert arguments.eval_steps == arguments.save_steps == 11
    assert arguments.warmup_steps == 3
    arguments = data(max_steps=7, eval_steps=2, save_steps=3).arguments
    arguments = arguments.for_examples(COUNT)
    assert (arguments.max_steps, arguments.eval_steps, arguments.save_steps) == (7, 2, 3)


def test_digests_differ_where_texts_do():
    assert digest(["a", "b"]) != digest(["ab"]) != digest(["a", "c"])
    assert digest(["a", "b"]) == digest(iter(["a", "b"]))


def draw_lengths(seed: int, count: int, longest: int = 512) -> list[int]:
    draw = random.Random(seed)
    return [min(longest, int(draw.lognormvariate(4, 1)) + 1) for _ in range(count)]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 32, 100])
def test_every_example_once_within_the_budget_and_as_many_batches_for_all(
    count, world_size, packing
):
    lengths = draw_lengths(count, count)
    budget = 1024
    ranks = deal(lengths, budget, world_size, packing)
    assert len(ranks) == world_size
    assert len({len(rank) for rank in ranks}) == 1
    rows = [row for rank in ranks for batch in rank for row in batch]
    assert sorted(itertools.chain(*rows)) == list(range(count))
    for batch in itertools.chain(*ranks):
        assert batch  # a rank without examples has a row without any
        sizes = [sum(lengths[index] for index in row) for row in batch]
        assert len(sizes) * max(sizes) <= budget
        assert max(sizes) <= max(lengths)
    if not packing:
        assert max(map(len, rows)) == 1


def padded(groups: list[list[int]], lengths: list[int]) -> int:
    return sum(len(group) * max(lengths[index] for index in group) for group in groups)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_cut_is_cheaper(seed):
    lengths = draw_lengths(seed, 10, longest=400)
    order = sorted(lengths, reverse=True)
    groups = cut_by_length(lengths, 1200)
    assert [lengths[index] for group in groups for index in group] == order
    cost = padded(groups, lengths) + MICRO_BATCH_COST * len(groups)
    cheapest = float("inf")
    for cuts in range(10):
        for ends in itertools.combinations(range(1, 10), cuts):
            parts = [order[a:b] for a, b in itertools.pairwise([0, *ends, 10])]
            if all(len(part) * part[0] <= 1200 for part in parts):
                total = sum(len(part) * part[0] + MICRO_BATCH_COST for part in parts)
                cheapest = min(cheapest, total)
    assert cost == cheapest


def test_an_example_longer_than_the_budget_comes_alone():
    assert cut_by_length([30, 5, 500, 40, 900], 100) == [[4], [2], [3, 0], [1]]
    assert cut_by_length([50, 50], 100) == [[0, 1]]
    assert cut_by_length([], 100) == []
    assert cut_by_length([0, 0, 7], 100) == [[2, 0, 1]]


def test_little_padding():
    lengths = draw_lengths(0, 64)
    (batches,) = deal(lengths, 8192, 1)
    groups = [[index for row in batch for index in row] for batch in batches]
    assert padded(groups, lengths) < 1.25 * sum(lengths)
    assert padded([list(range(64))], lengths) > 4 * sum(lengths)  # as one batch


def test_ranks_have_about_the_same_to_do():
    for seed in range(5):
        lengths = draw_lengths(seed, 128)
        ranks = deal(lengths, 4096, 4)
        loads = [
            padded([[index for row in batch for index in row] for batch in rank], lengths)
            for rank in ranks
        ]
        assert max(loads) < 1.3 * min(loads)


def test_best_fit():
    assert fit([5, 4, 3, 3, 2, 1], 6) == [[0, 5], [1, 4], [2, 3]]
    assert fit([6, 6], 6) == [[0], [1]]


def test_a_cut_costs(monkeypatch):
    lengths = [100] * 4 + [10] * 4
    assert len(deal(lengths, 10_000, 1)[0]) == 2  # 360 tokens of padding against a cut
    monkeypatch.setattr(epochs, "MICRO_BATCH_COST", 1000)
    assert len(deal(lengths, 10_000, 1)[0]) == 1
