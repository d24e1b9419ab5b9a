"""A run does not grow: descriptors, threads and memory, step by step."""

import os

import psutil
import pytest

from utils.engine import Engine


@pytest.mark.parametrize("workers", [0, 2])
def test_forty_steps_take_no_more_than_ten(workers, pretrain, corpus_folder, monkeypatch):
    """With evaluations, samples, checkpoints of which the oldest go, and a tracker."""
    taken, train_step = [], Engine.train_step
    this = psutil.Process()

    def watched(*arguments):
        with this.oneshot():
            found = this.num_fds(), this.num_threads(), this.memory_info().rss
        taken.append((*found, len(this.children())))
        return train_step(*arguments)

    monkeypatch.setattr(Engine, "train_step", watched)
    before = this.num_threads()
    ended = pretrain(
        max_steps=41,
        save_steps=3,
        eval_steps=4,
        keep_last=2,
        validation_sources=[{"path": str(corpus_folder / "validation.jsonl")}],
        eval_documents=10,
        sample_prompts=["ka"],
        report_to=["tensorboard"],
        dataloader_num_workers=workers,
    )
    assert ended.status == 0, ended.error
    descriptors, threads, memory, children = zip(*taken[10:], strict=True)
    assert [len({*descriptors}), len({*threads}), len({*children})] == [1, 1, 1]
    assert max(memory[-10:]) < 1.02 * max(memory[:10])
    assert len(os.listdir(ended.folder / "checkpoints")) == 2
    # the listener of signals has ended with the run
    assert this.num_threads() <= before + 2
