"""Stopping and going on, guards, schedules: what a run does besides its arithmetic."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler

import text_evaluation
from conftest import STOP_SIGNALS, make_documents, write_jsonl
from launching import ROOT, TINY_RUN, checkpoints, metrics, state, steps, write_state
from recipes.causal_lm import pretrain as causal_lm
from recipes.causal_lm.pretrain import NextTokenLoss
from utils import checkpoint, plots, report, stream, training
from utils.arguments import TrainingArguments
from utils.config import InputError
from utils.engine import Engine
from utils.model import initialize_weights
from utils.optimizer import make_optimizer
from utils.ranks import Ranks
from utils.run_folder import RunFolder
from utils.run_state import RunState
from utils.training import Training

DISTURBED = {
    # dropout: what is random must not depend on what ran before
    "model": {**TINY_RUN["model"], "attention_dropout": 0.1},
    "max_steps": 12,
    "save_steps": 4,
    "eval_steps": 3,
    "warmup_steps": 5,
    "eval_documents": 10,
    "sample_prompts": ["ka"],
}


@pytest.fixture
def disturbed(pretrain, corpus_folder):
    """pretrain with settings that leave much to go wrong."""
    held_out = [{"path": str(corpus_folder / "validation.jsonl")}]
    settings = {**DISTURBED, "validation_sources": held_out, "test_sources": held_out}
    return lambda name="run", **more: pretrain(name, **{**settings, **more})


@pytest.fixture(scope="module")
def remembered():
    return {}


@pytest.fixture
def undisturbed(remembered, disturbed):
    """What a run that nothing disturbs comes to."""
    if not remembered:
        ended = disturbed("undisturbed")
        assert ended.status == 0, ended.error
        remembered["result"] = result(ended)
    return remembered["result"]


def result(ended):
    """What must be the same, however often a run was interrupted."""
    (bits,) = re.findall(r"bits per byte of the test documents: ([\d.]+)", ended.output)
    weights = (ended.folder / "model" / "model.safetensors").read_bytes()
    return metrics(ended.folder), bits, weights


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def at_call(monkeypatch, owner, name, call, act):
    """Let `act` happen in the midst of one call of a function."""
    function, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            act()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


# signals

MOMENTS = {
    # (function, which of its calls, the step after which the run stops)
    "while the processes start": (training, "start_processes", 1, 0),
    "before the first step": (Training, "steps", 1, 0),
    "between two micro-batches": (Engine, "_backward", 7, 2),
    "in an update": (Engine, "_update", 5, 5),
    "in an evaluation": (Training, "forward", 6 + 2, 3),
    "in an evaluation at a checkpoint": (text_evaluation, "evaluate_by_domain", 4, 12),
    "while samples are written": (causal_lm, "write_samples", 2, 6),
    "in a save": (checkpoint, "save_file", 4, 8),
    "before the rename of a save": (checkpoint, "sync", 8, 4),
    "while a checkpoint is brought up to date": (checkpoint, "update", 3, 6),
    "while old checkpoints are pruned": (checkpoint, "prune", 11, 12),
    "while the last checkpoint is brought up to date": (checkpoint, "update", 7, 12),
    "in the last evaluation of all": (text_evaluation, "evaluate_by_domain", 5, 12),
}


SIGNALS = [(moment, STOP_SIGNALS[i % 4]) for i, moment in enumerate(MOMENTS)]


@pytest.mark.parametrize(
    ("moment", "number"), SIGNALS, ids=[f"{signal.Signals(n).name} {m}" for m, n in SIGNALS]
)
def test_a_signal_stops_the_run_and_it_goes_on_as_if_nothing_had_been(
    moment, number, disturbed, undisturbed, monkeypatch
):
    owner, name, call, step = MOMENTS[moment]
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, lambda: os.kill(os.getpid(), number))
        stopped = disturbed()
    assert stopped.status == 0
    assert stopped.error == ""
    told = f"{signal.Signals(number).name}: stopping after this step, with a checkpoint; "
    assert stopped.output.count(told) == 1
    assert f"\nstopped after step {step}; resume with: " in f"\n{stopped.output}"
    assert not (stopped.folder / "finished.json").exists()
    assert [c.name for c in checkpoints(stopped.folder)][-1:] == [f"step-{step:08d}"] * (step > 0)
    ended = disturbed()
    assert ended.status == 0
    assert (f"continuing {stopped.folder}/checkpoints/step-{step:08d}" in ended.output) == (
        step > 0
    )
    assert result(ended) == undisturbed


def test_a_run_that_is_stopped_again_and_again(disturbed, undisturbed, monkeypatch):
    for call in (5, 11, 3, 9):
        with monkeypatch.context() as patch:
            at_call(patch, Engine, "_backward", call, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert "; resume with: " in disturbed().output
    ended = disturbed()
    assert result(ended) == undisturbed


def test_the_second_of_two_signals_at_once_is_the_same(disturbed, undisturbed, monkeypatch):
    """A terminal sends Ctrl-C to the workers, and the launcher repeats it."""

    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        at_call(patch, Engine, "_backward", 7, interrupt_twice)
        stopped = disturbed()
    assert stopped.status == 0
    assert "stopped after step 2; resume with: " in stopped.output
    assert result(disturbed()) == undisturbed


def test_the_printed_command_is_the_one_that_was_given(tmp_path):
    """With and without a launcher; a space in a word is quoted."""
    script = tmp_path / "recipe.py"
    script.write_text("from utils.progress import command_line\nprint(command_line())\n")
    launcher = tmp_path / "accelerate"
    launcher.write_text(
        "import os, subprocess, sys\n"
        "environment = os.environ | {'RANK': '0'}\n"
        "subprocess.run([sys.executable, *sys.argv[2:]], env=environment, check=True)\n"
    )
    words = [str(script), "a config.yaml", "--max_steps", "3"]
    options = {"capture_output": True, "text": True, "check": True}
    options["env"] = os.environ | {"PYTHONPATH": str(ROOT)}
    plain = [sys.executable, *words]
    printed = subprocess.run(plain, **options).stdout
    assert shlex.split(printed) == plain
    launched = [str(launcher), "launch", *words]
    printed = subprocess.run([sys.executable, *launched], **options).stdout
    assert shlex.split(printed) == launched


# ends and new beginnings


def test_a_run_that_has_come_to_its_end_says_so(disturbed, undisturbed):
    first = disturbed()
    before = contents(first.folder)
    again = disturbed()
    assert again.status == 0
    assert again.output == f"{first.folder} is finished at step 12: all 12 steps are done\n"
    assert contents(first.folder) == before
    other = disturbed(learning_rate=1e-4)
    assert (other.status, other.output, other.error) == (
        2,
        "",
        f"error: {first.folder} is finished with learning_rate 0.003, this is 0.0001: "
        "choose another output_dir, or change it back\n",
    )
    assert contents(first.folder) == before


def test_the_end_of_a_finished_run_is_done_again_for_other_test_data(
    disturbed, undisturbed, corpus_folder
):
    disturbed(test_sources=[])
    ended = disturbed()
    assert (ended.status, ended.error) == (0, "")
    assert "bits per byte of the test documents: " in ended.output
    assert result(ended) == undisturbed


def test_a_run_that_was_killed_between_its_last_checkpoint_and_its_end(disturbed, undisturbed):
    first = disturbed()
    counted = [r["step"] for r in metrics(first.folder) if "tokens_by_source" in r]
    assert counted == [4, 8, 12]
    (first.folder / "finished.json").unlink()
    (first.folder / "model" / "model.safetensors").unlink()
    assert result(disturbed()) == undisturbed


def test_a_longer_run_is_the_continuation_of_a_shorter(disturbed):
    even = {
        "save_steps": 3,
        "warmup_steps": 3,
    }  # both runs save and evaluate at the shorter one's end
    whole = disturbed("whole", **even)
    for steps_more in (3, 9, 12):
        ended = disturbed("part", max_steps=steps_more, **even)
        assert f"all {steps_more} steps are done" in ended.output
        assert json.loads((ended.folder / "finished.json").read_text())["step"] == steps_more
    assert result(ended) == result(whole)


def test_max_tokens_and_max_hours(pretrain):
    ended = pretrain("tokens", max_tokens=3 * 16 * 32 - 1)
    assert len(steps(ended.folder)) == 3
    assert "all 3 steps are done" in ended.output
    ended = pretrain("hours", max_hours=1e-9)
    assert len(steps(ended.folder)) == 1
    assert "max_hours: 1e-09 have passed" in ended.output
    assert pretrain("hours", max_hours=1e-9).output.endswith("max_hours: 1e-09 have passed\n")
    ended = pretrain("hours", max_hours=1.0, max_steps=3)
    assert len(steps(ended.folder)) == 3


def test_early_stopping(disturbed, monkeypatch):
    """Ends when the loss has not become better, says why, and stays ended."""
    patience = {"early_stopping_patience": 2, "max_steps": 30, "learning_rate": 0.0}
    ended = disturbed(**patience)
    # the first evaluation, at step 3, is the best; those at 6 and 9 are no better
    assert len(steps(ended.folder)) == 9
    assert "9 steps" in ended.output
    assert "eval_loss has not improved 2 times" in ended.output
    assert "is finished at step 9: eval_loss has not" in disturbed(**patience).output
    # killed between its last checkpoint and its end
    (ended.folder / "finished.json").unlink()
    again = disturbed(**patience)
    assert len(steps(again.folder)) == 9
    assert "eval_loss has not improved 2 times" in again.output
    more = disturbed(**{**patience, "early_stopping_patience": 3})
    assert len(steps(more.folder)) == 12


def test_a_checkpoint_that_keeps_the_size_of_the_metrics_beside_the_counters(pretrain):
    """As checkpoints once did: what was logged before it stays."""
    first = pretrain(max_steps=8, save_steps=4)
    logged = metrics(first.folder)
    (first.folder / "finished.json").unlink()
    checkpoint = checkpoints(first.folder)[-1]
    older = state(checkpoint)
    older["metrics_size"] = older["counters"].pop("metrics_size")
    write_state(checkpoint, older)
    again = pretrain(max_steps=8, save_steps=4)
    assert again.status == 0, again.error
    assert metrics(first.folder) == logged


def test_resume_never(disturbed):
    first = disturbed()
    before = contents(first.folder)
    again = disturbed(resume="never")
    assert again.status == 2
    assert again.error == (
        f"error: {first.folder}/checkpoints/step-00000012 exists and resume is 'never': "
        "choose another output_dir, or remove it\n"
    )
    assert contents(first.folder) == before
    assert disturbed("new", resume="never").status == 0


def test_a_warm_start_takes_weights_and_optimizer_and_counts_from_0(pretrain, corpus_folder):
    first = pretrain("first", max_steps=5)
    (source,) = checkpoints(first.folder)
    data = [{"path": str(corpus_folder / "train-1.jsonl")}]
    frozen = {"learning_rate": 0.0, "weight_decay": 0.0, "train_sources": data, "max_steps": 1}
    second = pretrain("second", warm_start=str(source), seed=7, **frozen)
    assert second.status == 0, second.error
    (record,) = steps(second.folder)
    assert (record["step"], record["tokens"]) == (1, 16 * 32)
    (target,) = checkpoints(second.folder)
    assert state(target)["optimizer_step"] == 6
    before, after = (load_file(c / "rank-00000-of-00001.safetensors") for c in (source, target))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.startswith("parameter/"):
            assert torch.equal(after[name], tensor)
    # one more step: 0.9 of what it was, and 0.1 of a gradient that was clipped to a norm of 1
    change = sum(
        float((after[name] - 0.9 * tensor).square().sum())
        for name, tensor in before.items()
        if name.startswith("exp_avg/")
    )
    assert change**0.5 == pytest.approx(0.1 * min(1, record["grad_norm"]), rel=1e-4)
    # the model itself is the one that was saved: the loss is that of its weights
    other = pretrain("other", model_name_or_path=str(first.folder / "model"), **frozen, seed=7)
    assert steps(other.folder)[0]["loss"] == record["loss"]


def test_a_warm_start_from_another_shape_is_refused(pretrain):
    first = pretrain("first", max_steps=1)
    (source,) = checkpoints(first.folder)
    for hidden in (16, 64):
        model = {**TINY_RUN["model"], "hidden_size": hidden}
        second = pretrain("second", warm_start=str(source), max_steps=1, model=model)
        assert second.status == 2
        assert re.fullmatch(
            rf"error: {source} does not hold parameter of model.embed_tokens.weight in this size\n",
            second.error,
        )
        assert not second.folder.exists()


# guards


@pytest.fixture
def spoil(monkeypatch):
    """spoil({step: factor}): multiply the loss of one micro-batch of these steps."""

    def install(factors, micro_batches=4):
        forward, calls = NextTokenLoss.forward, []

        def spoiled(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            if isinstance(output, dict):
                calls.append(None)
                step, index = divmod(len(calls) - 1, micro_batches)
                if index == 1:
                    output = {"loss": output["loss"] * factors.get(step + 1, 1.0)}
            return output

        monkeypatch.setattr(NextTokenLoss, "forward", spoiled)

    return install


def saved(folder, step):
    return load_file(folder / f"checkpoints/step-{step:08d}/rank-00000-of-00001.safetensors")


def unchanged(folder, step):
    before, after = saved(folder, step - 1), saved(folder, step)
    same = {name: torch.equal(before[name], after[name]) for name in before}
    assert len(set(same.values())) == 1
    return all(same.values())


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_changes_no_bit(factor, pretrain, spoil):
    spoil({2: factor, 4: factor})
    ended = pretrain(max_steps=5, save_steps=1, keep_last=9, logging_steps=5)
    assert ended.status == 0
    assert [unchanged(ended.folder, step) for step in (2, 3, 4, 5)] == [True, False, True, False]
    records = {record["step"]: record for record in steps(ended.folder)}
    # logged although it is not the fifth
    assert {step for step, record in records.items() if record.get("skipped")} == {2, 4}
    assert f"step 2: skipped, loss {factor}, gradient norm " in ended.output
    assert "steps skipped: 2" in ended.output
    counters = [state(c)["counters"] for c in checkpoints(ended.folder)]
    assert [c["skipped_steps"] for c in counters] == [0, 1, 1, 2, 2]
    assert [c["skipped_in_a_row"] for c in counters] == [0, 1, 0, 1, 0]
    # the next update is the second of the optimizer, not the third
    assert [state(c)["optimizer_step"] for c in checkpoints(ended.folder)] == [1, 1, 2, 2, 3]


def test_a_gradient_that_is_not_finite_is_skipped_too(pretrain, monkeypatch):
    backward, calls = Engine._backward, []

    def spoiled(engine, loss, is_last):
        backward(engine, loss, is_last)
        calls.append(None)
        if len(calls) == 4 + 2:
            next(engine.model.parameters()).grad[0, 0] = float("inf")

    monkeypatch.setattr(Engine, "_backward", spoiled)
    ended = pretrain(max_steps=3, save_steps=1, keep_last=9)
    assert [unchanged(ended.folder, step) for step in (2, 3)] == [True, False]
    assert re.search(r"step 2: skipped, loss 6\.\d+, gradient norm (inf|nan)", ended.output)


def test_too_many_skipped_steps_in_a_row_stop_the_run(pretrain, spoil):
    nan = float("nan")
    spoil({2: nan, 3: nan, 5: nan, 6: nan, 7: nan})
    ended = pretrain(max_steps=12, save_steps=4, max_skipped_steps=3)
    assert ended.status == 2
    assert ended.error == (
        "error: 3 steps in a row, up to step 7, were skipped: loss or gradient not finite, or a "
        "spike. Look at the data or the learning_rate; the last good checkpoint: "
        f"{ended.folder}/checkpoints/step-00000004\n"
    )
    assert [bool(record.get("skipped")) for record in steps(ended.folder)] == [
        False, True, True, False, True, True, True,
    ]  # fmt: skip


def test_a_first_step_that_is_skipped_and_a_stop_right_after(pretrain, spoil, monkeypatch):
    """The optimizer has no state then, and the checkpoint none of it."""
    spoil({1: float("nan")})
    with monkeypatch.context() as patch:
        at_call(patch, Engine, "_backward", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert "stopped after step 1" in pretrain(max_steps=3).output
    spoil({})
    ended = pretrain(max_steps=3)
    assert ended.status == 0, ended.error
    (last,) = checkpoints(ended.folder)[-1:]
    assert state(last)["optimizer_step"] == 2


@pytest.mark.parametrize("skip", [False, True])
def test_a_spike_is_reported_and_can_be_skipped(skip, pretrain, spoil):
    spoil({23: 9.0})
    ended = pretrain(
        max_steps=24, save_steps=1, keep_last=3, logging_steps=10, skip_loss_spikes=skip
    )
    assert ended.status == 0
    assert unchanged(ended.folder, 23) == skip
    (record,) = (r for r in steps(ended.folder) if r.get("loss_spike"))
    assert record["step"] == 23
    assert record.get("skipped", False) == skip
    assert re.search(r"step 23: the loss of \d+\.\d+ is a spike \(above \d\.\d+\)", ended.output)
    counters = state(checkpoints(ended.folder)[-1])["counters"]
    assert counters["skipped_steps"] == skip
    # a spike that was skipped does not count as usual
    assert (record["loss"] in counters["recent_losses"]) != skip


def test_no_space_left(disturbed, undisturbed, monkeypatch):
    full = OSError(28, "No space left on device")

    def fail():
        raise full

    for place, call in (("save_file", 4), ("sync", 18)):
        folder = f"full in {place}"
        with monkeypatch.context() as patch:
            at_call(patch, checkpoint, place, call, fail)
            ended = disturbed(folder)
        assert ended.status == 2
        assert ended.error == (
            f"error: could not write {ended.folder}/checkpoints/step-00000008: [Errno 28] No space "
            f"left on device. The last good checkpoint is {ended.folder}/checkpoints/"
            "step-00000006: make room and start again\n"
        )
        left = sorted(p.name for p in (ended.folder / "checkpoints").iterdir())
        assert left == ["step-00000004", "step-00000006"]
        assert result(disturbed(folder)) == undisturbed


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (OSError(28, "No space left on device", "a.json"), "a.json: No space left on device"),
        (Exception("No space left on device (os error 28)"), "No space left on device"),
        (InputError("cannot write (os error 28)"), "^cannot write"),
    ],
)
def test_what_one_rank_alone_fails_in_ends_all(failure, told, monkeypatch):
    ranks = Ranks()
    monkeypatch.setattr(ranks, "any_rank", lambda mine: True)
    with pytest.raises(InputError, match=told) as error, ranks.together():
        raise failure
    assert error.value.one_rank
    with pytest.raises(SystemExit) as error, ranks.together():
        pass  # another one failed
    assert error.value.code == 2
    monkeypatch.setattr(ranks, "any_rank", lambda mine: mine)
    with ranks.together():
        pass
    ranks.signals.close()


RAISED = {
    # (function, which of its calls, what it raises, the step that is saved by then)
    "in an evaluation": (text_evaluation, "evaluate_by_domain", 2, SystemExit, 6),
    "in a forward of one": (Training, "forward", 6 + 2, SystemExit, 3),
    "while samples are written": (causal_lm, "write_samples", 3, InputError, 9),
    "by its results": (RunState, "note_evaluation", 1, InputError, 3),
    "by the next document": (stream, "collate", 4 * 7 + 2, SystemExit, 7),
    "in the last evaluation": (text_evaluation, "evaluate_by_domain", 4, SystemExit, 12),
    "in the test": (text_evaluation, "evaluate_by_domain", 5, InputError, 12),
    "by the card": (report, "write_card", 1, SystemExit, 12),
}


@pytest.mark.parametrize("place", RAISED)
def test_what_is_raised_between_steps_loses_none(place, disturbed, undisturbed, monkeypatch):
    """An error, or what is no Exception at all, as Rust's panics are not."""
    owner, name, call, kind, step = RAISED[place]

    def fail():
        raise kind("broken")

    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, fail)
        failed = disturbed()
    if kind is InputError:
        assert (failed.status, failed.error) == (2, "error: broken\n")
    else:
        assert failed.status == "broken"
    assert checkpoints(failed.folder)[-1].name == f"step-{step:08d}"
    assert not (failed.folder / "finished.json").exists()
    assert result(disturbed()) == undisturbed


def test_metrics_that_cannot_be_written_stop_the_run_with_a_checkpoint(
    disturbed, undisturbed, monkeypatch
):
    with monkeypatch.context() as patch:
        record, calls = RunFolder.record, []

        def refuse(folder, values):
            calls.append(values)
            if len(calls) == 2:
                raise InputError(f"cannot write {folder.metrics}: Input/output error")
            record(folder, values)

        patch.setattr(RunFolder, "record", refuse)
        failed = disturbed()
    assert (failed.status, failed.error) == (
        2,
        f"error: cannot write {failed.folder}/metrics.jsonl: Input/output error\n",
    )
    assert [c.name for c in checkpoints(failed.folder)] == ["step-00000002"]


def test_plots_and_trackers_that_fail_end_no_run(disturbed, undisturbed, monkeypatch):
    def fail(*args, **kwargs):
        raise SystemExit("broken")

    calls = []

    def fail_later(*args, **kwargs):
        calls.append(kwargs["step"])
        if len(calls) == 3:
            raise SystemExit("broken")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "write_plots", fail)
        patch.setattr(TensorBoardTracker, "log", fail_later)
        ended = disturbed(report_to=["tensorboard"])
    assert ended.status == 0
    assert ended.error == (
        "warning: report_to: tensorboard is left out from here on: SystemExit: broken\n"
        "warning: no plots: SystemExit: broken\n"
    )
    assert calls == [1, 2, 3]
    assert result(ended) == undisturbed
    assert "is finished at step 12" in disturbed(report_to="none").output


EXPORTED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_GRADIENT_CLIPPING": "0.5",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "eager",
}


def test_exported_variables_of_accelerate_change_nothing_and_are_told(
    disturbed, undisturbed, monkeypatch
):
    for name, value in EXPORTED.items():
        monkeypatch.setenv(name, value)
    ended = disturbed()
    for name, value in EXPORTED.items():
        assert f"\n{name}={value} is left aside: " in f"\n{ended.output}"
    assert result(ended) == undisturbed


@pytest.mark.parametrize(
    ("report_to", "told"),
    [
        (["wandb"], "report_to: wandb is not installed: pip install wandb, or leave it out"),
        ("mlflow", "report_to: mlflow is not installed: pip install mlflow, or leave it out"),
        (
            "paper",
            "report_to: no tracker 'paper': give all, none, or of aim, clearml, comet_ml, "
            "dvclive, mlflow, swanlab, tensorboard, trackio, wandb",
        ),
    ],
)
def test_a_tracker_that_is_not_there(report_to, told, pretrain, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as wandb leaves it, where it was once
    monkeypatch.syspath_prepend(tmp_path)
    ended = pretrain(max_steps=1, report_to=report_to)
    assert (ended.status, ended.output, ended.error) == (2, "", f"error: {told}\n")
    assert not ended.folder.exists()


@pytest.mark.parametrize(
    ("report_to", "is_written"),
    [("tensorboard", True), ("all", True), (["all"], True), ("none", False), (["none"], False)],
)
def test_trackers_by_their_name(report_to, is_written, pretrain):
    ended = pretrain(max_steps=1, report_to=report_to)
    assert (ended.status, ended.error) == (0, "")
    assert any(ended.folder.glob("events.out.tfevents.*")) == is_written


def test_a_tracker_that_does_not_start(pretrain, monkeypatch):
    def fail(self):
        raise ValueError("no key")

    monkeypatch.setattr(TensorBoardTracker, "start", fail)
    ended = pretrain(max_steps=1, report_to="tensorboard")
    assert (ended.status, ended.error) == (2, "error: report_to: ValueError: no key\n")


def test_a_broken_record_in_the_midst_of_a_run(pretrain, tmp_path):
    """What was trained until then is saved, and the remedy that is told works."""
    data = tmp_path / "data.jsonl"
    write_jsonl(data, [*make_documents("before", 60), {"text": 1}, *make_documents("after", 60)])
    settings = {
        "train_sources": [{"path": str(data)}],
        "lanes": 1,
        "shuffle_documents": 8,
        "max_steps": 12,
    }
    stopped = pretrain(**settings)
    assert stopped.status == 2
    assert stopped.error == (
        f"error: {data}, line 61: int, not text, in the field 'text' (it has: text); "
        "--on_bad_record skip leaves such records out\n"
    )
    (last,) = checkpoints(stopped.folder)
    done = len(steps(stopped.folder))
    assert 0 < done < 12
    assert last.name == f"step-{done:08d}"
    ended = pretrain(**settings, on_bad_record="skip")
    assert ended.status == 0
    assert f"continuing {last}" in ended.output
    assert f"warning: skipped {data}, line 61: int, not text" in ended.error
    whole = pretrain("whole", **settings, on_bad_record="skip")
    assert steps(ended.folder) == steps(whole.folder)


# schedules, optimizer, initialisation

SCHEDULES = {
    "linear": {},
    "cosine": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 3, "min_lr_ratio": 0.05},
    "constant": {},
    "constant_with_warmup": {},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_is_that_of_transformers_at_every_step(name, pretrain):
    settings = {
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": SCHEDULES[name],
        "warmup_steps": 2,
        "max_steps": 8,
        "save_steps": 100,
    }
    ended = pretrain(**settings)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-3)
    scheduler = get_scheduler(name, optimizer, 2, 8, SCHEDULES[name])
    expected = []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rates = [record["learning_rate"] for record in steps(ended.folder)]
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_norms_and_biases_do_not_decay():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay, rest = make_optimizer(model, TrainingArguments(weight_decay=0.3)).param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert {names[p] for p in decay["params"]} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
    }
    assert len(decay["params"]) + len(rest["params"]) == len(names)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "mixtral", "gemma3_text"])
def test_weights_are_initialised_as_transformers_does_by_seed_and_name(model_type):
    config = AutoConfig.for_model(
        model_type,
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    for name, value in {"intermediate_size": 64, "num_local_experts": 2}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    usual = AutoModelForCausalLM.from_config(config)
    models = [AutoModelForCausalLM.from_config(config) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        initialize_weights(model, seed)
        torch.rand(1)  # what was drawn before has no say
    first, again, other = (dict(model.named_parameters()) for model in models)
    for name, parameter in usual.named_parameters():
        assert torch.equal(first[name], again[name])
        deviation = float(parameter.detach().std())
        if deviation == 0:  # norms and biases
            assert torch.equal(first[name], parameter)
            continue
        assert not torch.equal(first[name], other[name])
        same = [n for n, p in first.items() if p.shape == parameter.shape]
        assert [n for n in same if torch.equal(first[n], first[name])] == [name]
        assert not torch.equal(first[name], parameter)
        # two samples of n numbers differ in their deviation by 1 / √n of it, more or less
        tolerance = 5 / parameter.numel() ** 0.5
        assert float(first[name].detach().std()) == pytest.approx(deviation, rel=tolerance)


def test_torch_compile_compiles_the_model_that_the_objective_calls(pretrain, monkeypatch):
    compiled = []
    compile_module = torch.nn.Module.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compile_module(module, backend=backend)
    )
    plain = pretrain("plain", max_steps=2)
    assert not compiled
    ended = pretrain("compiled", max_steps=2, torch_compile=True)
    assert ended.status == 0, ended.error
    assert compiled
    losses = [record["loss"] for record in steps(plain.folder)]
    assert [record["loss"] for record in steps(ended.folder)] == pytest.approx(losses, rel=1e-6)
