"""The layout of a step: every example once, within the budget, fair, and as cheap as can be."""

import itertools
import random

import pytest

from utils import batching
from utils.batching import MICRO_BATCH_COST, deal, fit


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


def test_no_other_cut_is_cheaper():
    lengths = draw_lengths(3, 10, longest=400)
    order = sorted(lengths, reverse=True)
    (batches,) = deal(lengths, 1200, 1)
    groups = [[index for row in batch for index in row] for batch in batches]
    cost = padded(groups, lengths) + MICRO_BATCH_COST * len(groups)
    cheapest = float("inf")
    for cuts in range(10):
        for ends in itertools.combinations(range(1, 10), cuts):
            parts = [order[a:b] for a, b in itertools.pairwise([0, *ends, 10])]
            if all(len(part) * part[0] <= 1200 for part in parts):
                total = sum(len(part) * part[0] + MICRO_BATCH_COST for part in parts)
                cheapest = min(cheapest, total)
    assert cost == cheapest


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
    monkeypatch.setattr(batching, "MICRO_BATCH_COST", 1000)
    assert len(deal(lengths, 10_000, 1)[0]) == 1
