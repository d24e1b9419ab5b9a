"""Bars: of the first rank, on a terminal; what is tokenized comes in batches behind one."""

import io
import sys

import pytest

from utils.progress import in_batches, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "rank", "is_shown"),
    [
        (Terminal, None, True),
        (Terminal, "0", True),
        (Terminal, "1", False),
        (io.StringIO, "0", False),
    ],
    ids=["one process", "first rank", "another rank", "a file"],
)
def test_a_bar_is_for_a_terminal_and_of_the_first_rank(stream, rank, is_shown, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "stderr", stream())
    with progress_bar(10, "counting", "sheep") as bar:
        bar.delay = bar.mininterval = 0  # else it is not shown in the first second
        bar.update(10)
        shown = sys.stderr.getvalue()
        assert ("counting: 100%" in shown and "10/10" in shown and " sheep/s" in shown) == is_shown
    assert sys.stderr.getvalue().rstrip("\r").rpartition("\r")[2].strip() == ""  # gone


@pytest.mark.parametrize("count", [0, 1, 256, 600])
def test_every_item_comes_once_with_its_index(count):
    batches = list(in_batches(range(count), "items"))
    assert [start + place for start, batch in batches for place in range(len(batch))] == [
        item for _, batch in batches for item in batch
    ]
    assert [item for _, batch in batches for item in batch] == list(range(count))
    assert all(len(batch) == 256 for _, batch in batches[:-1])
