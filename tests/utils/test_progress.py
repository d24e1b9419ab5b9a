"""Bars: of the first rank, on a terminal; what is tokenized comes in batches behind one."""

import io
import sys

import pytest

from utils.program import say
from utils.progress import in_batches, progress_bar, told


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "rank", "shown"),
    [
        (Terminal, None, ["counting: 100%", "10/10", " sheep/s"]),
        (Terminal, "0", ["counting: 100%", "10/10", " sheep/s"]),
        (Terminal, "1", []),
        (io.StringIO, "0", ["counting: 10 of 10 sheep, 00:00 left\n"]),
        (io.StringIO, "1", []),
    ],
)
def test_a_bar_is_for_a_terminal_and_lines_for_a_file(stream, rank, shown, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "stderr", stream())
    with progress_bar(10, "counting", "sheep") as bar:
        bar.update(1)
        assert sys.stderr.getvalue() == ""  # nothing is shown in the first second
        bar.delay = bar.mininterval = 0
        bar.update(9)
        text = sys.stderr.getvalue()
        assert [part for part in shown if part not in text] == []
        assert bool(text) == bool(shown)
    assert sys.stderr.getvalue().rstrip("\r").rpartition("\r")[2].strip() == ""  # gone


@pytest.mark.parametrize("count", [0, 1, 256, 600])
def test_every_item_comes_once_with_its_index(count):
    batches = list(in_batches(range(count), "items"))
    assert [start + place for start, batch in batches for place in range(len(batch))] == [
        item for _, batch in batches for item in batch
    ]
    assert [item for _, batch in batches for item in batch] == list(range(count))
    assert all(len(batch) == 256 for _, batch in batches[:-1])


def test_an_evaluation_is_one_line_with_what_it_is_judged_by():
    scores = {f"eval_score_{number}": number / 7 for number in range(20)}
    record = {"step": 5, "eval_tokens": 9, "eval_loss_by_domain": {"a": 1.0}, **scores}
    line = told({**record, "eval_loss": 2.5}, "eval_score_19")
    assert line.startswith("step 5  eval_loss 2.5000  eval_score_19 2.7143  eval_score_0 0.0000")
    assert "\n" not in line
    assert len(line) <= 120
    assert told(record, "eval_loss") == ""  # of a test: told at the end


def test_samples_are_shown_with_the_end_of_their_prompt(capsys):
    samples = [{"prompt": "x" * 500 + "def ", "text": "f(\x1b[31m):\n\treturn"}]
    say(told({"step": 5, "samples": samples}, "eval_loss"))
    shown = "x" * 236 + "def f(\\x1b[31m):\n\treturn\n"
    assert capsys.readouterr().out == f"sample: …{shown}"


def test_only_the_first_rank_says_something(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    say("something")
    monkeypatch.setenv("RANK", "0")
    say("")
    assert capsys.readouterr().out == ""
