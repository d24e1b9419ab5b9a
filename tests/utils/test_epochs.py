"""The steps of a finite set, and their layout: each example once, as cheap as can be, any ranks."""

import itertools
import random

import numpy as np
import pytest
import torch

from utils import epochs
from utils.arguments import FinetuningArguments
from utils.epochs import MICRO_BATCH_COST, Epochs, cut_by_length, deal, digest, fit
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
    return Epochs(
        examples,
        lambda rows: {"indices": torch.tensor([[e["index"] for e in row] for row in rows if row])},
        {"the training data": "x"},
        arguments,
        vary=lambda indices, epoch: [{**examples[i], "epoch": epoch} for i in indices],
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
