"""The steps of a finite set: a function of the data, the seed and the step alone."""

import itertools

import numpy as np
import torch

from utils.epochs import Epochs, digest
from utils.finetuning_arguments import FinetuningArguments
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
        COUNT,
        lambda indices, epoch: [{**examples[i], "epoch": epoch} for i in indices],
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


def test_tokens_are_those_of_the_examples():
    step = next(data().steps(0, 1, 0, {}))
    assert step.tokens == sum(1 + i % 17 for i in indices_of([step]))


def test_the_length_of_a_run_follows_from_its_epochs():
    arguments = data(num_train_epochs=2.5, warmup_ratio=0.1).arguments
    arguments.set_length(COUNT)
    assert arguments.max_steps == 28  # 2.5 x 11, rounded up
    assert arguments.eval_steps == arguments.save_steps == 11
    assert arguments.warmup_steps == 3
    arguments = data(max_steps=7, eval_steps=2, save_steps=3).arguments
    arguments.set_length(COUNT)
    assert (arguments.max_steps, arguments.eval_steps, arguments.save_steps) == (7, 2, 3)


def test_digests_differ_where_texts_do():
    assert digest(["a", "b"]) != digest(["ab"]) != digest(["a", "c"])
    assert digest(["a", "b"]) == digest(iter(["a", "b"]))
