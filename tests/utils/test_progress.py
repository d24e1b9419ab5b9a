"""Bars: of the first rank, on a terminal; what is tokenized comes in batches behind one; what
trackers are told of a run."""

import io
import json
import sys

import accelerate
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from launching import metrics
from utils import progress
from utils.arguments import TrainingArguments
from utils.program import say
from utils.progress import Progress, in_batches, progress_bar, told
from utils.run_state import RunState


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


def test_tensorboard_has_the_metrics_in_groups_and_the_settings(pretrain, corpus_folder):
    """As its own reader finds them in the run's folder."""
    files = {
        "domain_field": "meta.redpajama_set_name",
        "path": str(corpus_folder / "validation.jsonl"),
    }
    ended = pretrain(
        max_steps=4,
        eval_steps=2,
        report_to="tensorboard",
        validation_sources=[files],
        test_sources=[files],
        weight_decay=0.03,
    )
    assert (ended.status, ended.error) == (0, "")
    events = EventAccumulator(str(ended.folder)).Reload()
    expected = {}
    for record in metrics(ended.folder):
        for key, value in record.items():
            group, _, name = key.partition("_")
            group, name = (group, name) if group in ("eval", "test") else ("train", key)
            by = value if name.endswith("_by_domain") else {None: value}
            for domain, number in by.items() if key != "step" and "_by_source" not in key else ():
                name = name.removesuffix("_by_domain")
                tag = f"{group}/{name}" + (f"/{domain}" if domain else "")
                expected.setdefault(tag, []).append((record["step"], pytest.approx(number)))
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in expected}
    assert found == expected
    rates = {f"train/{name}" for name in ("tokens_per_second", "mfu")}
    assert {*events.Tags()["scalars"]} - rates == {*expected}
    assert {
        "train/loss",
        "train/learning_rate",
        "eval/loss",
        "eval/loss/Book",
        "test/loss/Web",
    } <= {*expected}
    assert [step for step, _ in expected["eval/bits_per_byte/Code"]] == [2, 4]
    contents = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    settings = metadata.parse_session_start_info_plugin_data(contents).hparams
    assert settings["weight_decay"].number_value == 0.03
    assert settings["model.hidden_size"].number_value == 32
    assert json.loads(settings["test_sources"].string_value)[0]["path"] == files["path"]
    folders = {path.name for path in ended.folder.iterdir() if path.is_dir()}
    assert folders == {"checkpoints", "model"}


TRACKER = """
told = []

def init(**options):
    told.append(options)

class config:
    @staticmethod
    def update(values, **options):
        told.append(values["seed"])
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"project": "lions", "run_name": "first"}, {"project": "lions", "name": "first"}),
        ({}, {"project": "huggingface", "name": "runs/a"}),
    ],
)
def test_project_and_name_of_a_run(given, expected, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    arguments = TrainingArguments(output_dir="runs/a", report_to="wandb", seed=7, **given)
    Progress(accelerate.Accelerator(cpu=True), arguments, RunState(), lambda step: 0.0)
    assert sys.modules.pop("wandb").told == [expected, 7]


def test_no_character_of_a_domain_is_refused_by_a_tracker():
    record = {"step": 3, "eval_loss_by_domain": {"C++ | 東京": 1.5}, "loss_spike": True}
    assert dict(progress._tracked(record)) == {
        "eval/loss/C_____東京": 1.5,
        "train/loss_spike": True,
    }
