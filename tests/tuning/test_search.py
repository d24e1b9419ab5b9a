"""A search of known losses: what is tried, stopped, counted and named the best, whatever happens.

The trials are runs of training_script.py beside this file, in which the loss is a function of the
settings; one is of a real recipe.
"""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from launching import ROOT, command_line
from recipes.classification import finetune
from recipes.tuning import search as tuning
from search_space import Space, is_pruned
from trial_records import Metric
from trial_run import Trial
from utils.config import InputError, parse

SCRIPT = str(Path(__file__).with_name("training_script.py"))
SHARED = {
    "output_dir": "unused",
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "max_steps": 3,
    "killed_before": 0,
    "killed_after": 0,
    "held": "nowhere",
    "metric_for_best_model": "eval_loss",
    "load_best_model_at_end": False,
    "validation_data": [{"path": "validation.jsonl"}],
    "test_data": [{"path": "test.jsonl"}],
}
GRID = {"learning_rate": [1e-3, 1e-2, 1e-1], "weight_decay": [0.0, 0.5]}
RANGE = {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}


@pytest.fixture
def words(tmp_path: Path) -> Callable[..., list[str]]:
    """words(name, shared={}, **settings): the command line of a search."""

    def of(name: str, shared: dict[str, Any] | None = None, **settings: Any) -> list[str]:
        config = tmp_path / f"{name}.yaml"
        config.write_text(json.dumps(SHARED | (shared or {})))
        own = {"script": SCRIPT, "config": str(config), "output_dir": str(tmp_path / name)}
        return command_line({**own, "pruner": "none", **settings})

    return of


@pytest.fixture
def search(
    call: Callable, words: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable:
    """search(name, shared={}, **settings): it, in this process, without its slow picture."""
    monkeypatch.setattr(tuning, "write_plot", lambda *_: None)
    return lambda name, shared=None, **settings: call(
        tuning.main, words(name, shared, **settings), tmp_path / name
    )


def records(folder: Path) -> list[dict[str, Any]]:
    """Of the trials, without what a clock measured."""
    lines = (folder / "trials.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def starts(folder: Path, trial: int) -> list[int]:
    """The processes that have run it."""
    return [*map(int, (folder / f"trials/trial-{trial:03d}/starts").read_text().split())]


def test_a_grid_is_run_whole_and_the_best_is_a_config(search, tmp_path):
    ended = search("grid", method="grid", settings=GRID | {"learning_rate": [1e-3, 1e-2, 1.0]})
    assert ended.status == 0, ended.error
    found = records(ended.folder)
    tried = [(r["settings"]["learning_rate"], r["settings"]["weight_decay"]) for r in found]
    assert tried == [(rate, decay) for rate in (1e-3, 1e-2, 1.0) for decay in (0.0, 0.5)]
    values = [r["value"] for r in found]
    assert values[:4] == pytest.approx([1 + 1 / 3, 1.5 + 1 / 3, 1 / 3, 0.5 + 1 / 3])
    assert [r["status"] for r in found] == ["complete"] * 4 + ["failed"] * 2
    assert found[4]["reason"] == "5 steps in a row were skipped: loss not finite"
    assert "6 trials: 4 complete, 2 failed" in ended.output
    assert "trial 2 of 6: learning_rate 0.001  weight_decay 0.5  (0:00:0" in ended.output

    best = yaml.safe_load((ended.folder / "best.yaml").read_text())
    where = {"output_dir": str(ended.folder / "trials/trial-003")}
    assert best == SHARED | where | {"learning_rate": 1e-2, "weight_decay": 0.0}
    seen_by_trials = json.loads((ended.folder / "trials/trial-003/config.yaml").read_text())
    assert seen_by_trials == best | {"test_data": []}
    assert f"the best one: python {SCRIPT} {ended.folder}/best.yaml" in ended.output
    card = (ended.folder / "README.md").read_text()
    assert "| **3** | 0.3333 | 0.01 | 0 | complete |" in card
    again = search("grid", method="grid", settings=GRID | {"learning_rate": [1e-3, 1e-2, 1.0]})
    assert again.status == 0
    assert records(ended.folder) == found
    assert all(len(starts(ended.folder, trial)) == 1 for trial in range(1, 7))


def test_the_metric_and_which_way_is_better(search):
    rates = {"learning_rate": [1e-3, 1e-2]}
    ended = search("by_score", method="grid", settings=rates, metric="score")
    assert "the highest eval_score is the best" in ended.output
    best = yaml.safe_load((ended.folder / "best.yaml").read_text())
    assert best["learning_rate"] == 1e-2
    assert best["metric_for_best_model"] == "score"  # what the trials themselves go by


@pytest.mark.parametrize(
    ("is_best_kept", "is_greater_better", "value"),
    [(True, False, 1.0), (True, True, 3.0), (False, False, 2.0)],
)
def test_a_trial_is_as_good_as_the_weights_that_it_leaves(is_best_kept, is_greater_better, value):
    metric = Metric("eval_loss", is_greater_better, is_best_kept)
    assert metric.result([(1, 3.0), (2, 1.0), (3, None), (4, 2.0)]) == value


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A file that names the trial which is not to go on after its second step."""
    return tmp_path / "held"


def test_a_search_that_is_killed_goes_on_to_the_same_end(search, words, held, tmp_path):
    options = {"trials": 6, "startup_trials": 2, "seed": 1, "settings": RANGE, "pruner": "median"}
    options["shared"] = {"max_steps": 4, "held": str(held)}
    undisturbed, folder, victim = search("undisturbed", **options), tmp_path / "killed", 4
    held.write_text(f"trial-{victim:03d}")
    line = [sys.executable, "recipes/tuning/search.py", *words("killed", **options)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        state = folder / f"trials/trial-{victim:03d}/checkpoints/step"
        while not state.exists() or state.read_text() != "2":
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    with suppress(ProcessLookupError):
        os.kill(starts(folder, victim)[0], signal.SIGKILL)
    held.unlink()
    assert len(records(folder)) == victim - 1
    ended = search("killed", **options)
    assert ended.status == 0, ended.error
    found = records(folder)
    assert found == records(undisturbed.folder)
    assert {"complete", "pruned"} == {record["status"] for record in found}
    assert [len(starts(folder, trial)) for trial in range(1, 7)] == [1, 1, 1, 2, 1, 1]
    configs = [(f / "best.yaml").read_text() for f in (folder, undisturbed.folder)]
    assert configs[0] == configs[1].replace(str(undisturbed.folder), str(folder))


def test_a_trial_ends_with_a_search_that_is_killed(held, tmp_path):
    held.write_text("trial-001")
    (tmp_path / "shared.yaml").write_text(json.dumps(SHARED | {"held": str(held)}))
    folder, alone = tmp_path / "trial-001", SimpleNamespace(first=0)
    line = [sys.executable, SCRIPT, str(tmp_path / "shared.yaml"), "--output_dir", str(folder)]
    trial = Trial(line, folder, Metric("eval_loss", False, False), lambda *_: False, alone)
    search = multiprocessing.get_context("fork").Process(target=trial.run)
    search.start()
    while not (state := folder / "checkpoints/step").exists() or state.read_text() != "2":
        assert search.is_alive()
        time.sleep(0.01)
    run = psutil.Process(int((folder / "starts").read_text()))
    search.kill()
    run.wait(60)
    assert "stopped after step 2" in (tmp_path / "trial-001.log").read_text()


def test_a_trial_that_is_worse_than_the_median_is_stopped_with_a_checkpoint(search, held):
    held.write_text("trial-003")
    rates = {"learning_rate": [1e-2, 1e-1, 1e-4, 2e-2]}
    options = {"pruner": "median", "startup_trials": 2, "settings": rates, "method": "grid"}
    ended = search("pruned", {"held": str(held)}, **options)
    pruned = records(ended.folder)[2]
    assert [r["status"] for r in records(ended.folder)] == ["complete"] * 2 + ["pruned", "complete"]
    assert pruned["reason"] == "5.0000 at step 1"
    assert pruned["evaluations"] == [[1, 5.0]]
    folder = ended.folder / "trials/trial-003"
    assert (folder / "checkpoints/step").read_text() == "2"
    assert json.loads((folder / "trial.json").read_text())["status"] == "pruned"
    assert "stopped after step 2" in (ended.folder / "trials/trial-003.log").read_text()


def test_a_stopped_search_stops_its_trial_and_says_how_it_goes_on(search, held, tmp_path):
    folder = tmp_path / "stopped"
    state = folder / "trials/trial-002/checkpoints/step"
    held.write_text("trial-002")

    def stop() -> None:
        while not state.exists() or state.read_text() != "2":
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    rates = {"learning_rate": [1e-3, 1e-2]}
    ended = search("stopped", {"held": str(held)}, method="grid", settings=rates)
    thread.join()
    assert ended.status == 0
    assert "stopped after 1 trials; resume with: " in ended.output
    assert len(records(folder)) == 1
    assert not psutil.pid_exists(starts(folder, 2)[0])


def test_a_trial_that_is_killed_is_started_again_and_fails_where_that_helps_nothing(search):
    rates = {"learning_rate": [1e-3, 1e-2]}
    once = search("once", {"killed_after": 2}, method="grid", settings=rates)
    assert [record["status"] for record in records(once.folder)] == ["complete"] * 2
    assert [len(starts(once.folder, trial)) for trial in (1, 2)] == [2, 2]
    ended = search("dying", {"killed_before": 2}, method="grid", settings=rates)
    found = [(record["status"], record["reason"]) for record in records(ended.folder)]
    assert found == [("failed", "ended by SIGKILL")] * 2
    assert [len(starts(ended.folder, trial)) for trial in (1, 2)] == [2, 2]
    assert ended.status == 2
    assert "no trial has come to its end; the last one failed: ended by SIGKILL" in ended.error


def test_a_misspelt_setting_is_one_message_before_anything_is_written(search):
    ended = search("misspelt", method="grid", settings={"learning_rat": [1e-3]})
    assert ended.status == 2
    assert ended.error == (
        f"error: {SCRIPT}: --learning_rat: unknown key 'learning_rat': "
        "the nearest valid one is 'learning_rate'\n"
    )
    assert not ended.folder.exists()


@pytest.mark.parametrize("launch", [[], ["python", "launcher.py", "python"]])
def test_a_value_that_the_script_refuses_stops_the_search(search, tmp_path, launch):
    """Also where a launcher turns every status into 1."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode > 0)"
    )
    launch = [word.replace("launcher.py", str(launcher)) for word in launch]
    values = {"learning_rate": [1e-3, "fast", 1e-2]}
    ended = search("refused", method="grid", settings=values, launch=launch)
    assert ended.status == 2
    assert "learning_rate must be a number, not 'fast'" in ended.error
    assert [record["status"] for record in records(ended.folder)] == ["complete"]


def test_trials_are_compared_by_validation_data(search):
    shared = {"validation_data": []}
    ended = search("blind", shared, method="grid", settings=GRID)
    assert ended.status == 2
    assert "has no validation data" in ended.error
    assert not ended.folder.exists()


def test_which_way_is_better_is_not_taken_from_another_metric(search):
    shared = {"greater_is_better": True, "metric_for_best_model": "score"}
    ended = search("unclear", shared, method="grid", settings=GRID, metric="loss")
    assert ended.status == 2
    assert "says greater_is_better of score, and this is loss" in ended.error


def test_another_search_does_not_go_on_in_its_folder(search):
    options = {"method": "random", "settings": RANGE}
    assert search("mine", trials=1, **options).status == 0
    for shared, change, name in (
        ({}, {"seed": 1}, "seed was 0 and is 1"),
        ({"max_steps": 4}, {}, "max_steps in "),
    ):
        ended = search("mine", shared, trials=1, **options, **change)
        assert ended.status == 2
        assert name in ended.error
    assert search("mine", trials=2, **options).status == 0  # more of them
    assert [len(records(Path(ended.folder)))] == [2]


def test_a_trial_that_has_begun_is_not_continued_with_other_settings(search):
    options = {"method": "grid", "settings": {"learning_rate": [1e-3]}}
    first = search("begun", method="grid", settings={"learning_rate": ["slow"]})
    assert "learning_rate must be a number, not 'slow'" in first.error
    assert search("begun", **options).status == 0  # nothing had begun
    (first.folder / "trials.jsonl").unlink()  # as where a kill comes in the first trial
    ended = search("begun", method="grid", settings={"learning_rate": [1e-2]})
    assert "cannot continue" in ended.error


def test_weights_that_are_not_the_best_are_removed(search):
    rates = {"learning_rate": [1e-3, 1e-2, 1e-1]}
    ended = search("kept", method="grid", settings=rates, keep_weights="best")
    assert [path.parent.name for path in ended.folder.glob("trials/*/checkpoints")] == ["trial-002"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"settings": {}}, "settings: give at least one"),
        ({"settings": {"lr": []}}, "settings.lr: give different values"),
        ({"settings": {"lr": [1, 1]}}, "settings.lr: give different values"),
        ({"settings": {"lora": {"r": [1, 2]}}}, "named with dots: lora.r"),
        ({"settings": {"lr": {"low": 1, "high": "2"}}}, "settings.lr.high must be a number"),
        ({"settings": {"lr": {"low": 2, "high": 1}}}, "low: 2 must be below high: 1"),
        ({"settings": {"lr": {"low": 0, "high": 1, "log": True}}}, "low above 0"),
        ({"settings": {"lr": {"low": 0, "high": 1, "step": 2}}}, "step must be above 0"),
        ({"settings": {"eval_documents": [1, 2]}}, "does not change what is trained"),
        ({"settings": RANGE, "method": "grid", "trials": None}, "needs a list of values"),
        ({"settings": GRID, "method": "grid"}, "a grid is run whole"),
        ({"settings": RANGE, "trials": None}, "say how many"),
        ({"settings": RANGE, "trials": 0}, "trials must be at least 1"),
    ],
)
def test_what_makes_no_search_is_refused(settings, message):
    values = {"script": "a", "config": "a", "output_dir": "a", "trials": 3} | settings
    with pytest.raises(InputError) as error:
        parse(tuning.Arguments, command_line(values))
    assert message in str(error.value)


def simulated(trials: int, **settings: Any) -> list[dict[str, Any]]:
    """The records of a search in which trials take no time."""
    args = tuning.Arguments("", "", output_dir="", **{"settings": RANGE, "trials": 100} | settings)
    space = Space(args, {"learning_rate": 1e-3, "layers": 2}, False)
    found: list[dict[str, Any]] = []
    while len(found) < trials and (chosen := space.choose(found)):
        trial, values = chosen
        rate, layers = values.get("learning_rate", 1e-2), values.get("layers", 1)
        evaluations, status = [], "complete"
        for step in (1, 2, 4, 8):
            loss = (math.log10(rate) + 2) ** 2 + abs(layers - 3) + 1 / step
            evaluations.append([step, loss])
            if is_pruned(trial, step, loss):
                status = "pruned"
                break
        found.append(
            {
                "settings": values,
                "status": "failed" if rate > 0.09 else status,
                "evaluations": evaluations,
                "value": loss,
            }
        )
    return found


SPACE = RANGE | {"layers": {"low": 1, "high": 8}, "mode": ["a", ["b"], None]}


@pytest.mark.parametrize("method", ["tpe", "random"])
@pytest.mark.parametrize("pruner", ["none", "median", "successive_halving"])
def test_a_trial_is_a_function_of_seed_and_results(method, pruner):
    options = {"settings": SPACE, "method": method, "pruner": pruner}
    found = simulated(12, **options)
    assert simulated(12, **options) == found
    assert simulated(5, **options) == found[:5]
    assert simulated(12, **options, seed=1) != found
    assert any(record["status"] == "pruned" for record in found) == (pruner != "none")
    for record in found:
        rate, layers, mode = record["settings"].values()
        assert 1e-4 <= rate <= 1e-1
        assert rate == float(f"{rate:.4g}")
        assert type(layers) is int
        assert 1 <= layers <= 8
        assert mode in ("a", ["b"], None)


def test_tpe_comes_nearer_than_chance():
    options = {"settings": SPACE, "pruner": "none"}
    late = {
        m: sorted(r["value"] for r in simulated(40, method=m, **options)[20:])
        for m in ("tpe", "random")
    }
    assert late["tpe"][10] < 0.5 * late["random"][10]


def test_nothing_is_tried_twice_and_a_search_ends_where_all_was():
    found = simulated(50, settings={"layers": {"low": 1, "high": 4}}, method="random")
    assert sorted(record["settings"]["layers"] for record in found) == [1, 2, 3, 4]


def test_a_real_recipe_is_searched_and_its_best_run_is_tested_without_training(call, tmp_path):
    smoke = ROOT / "recipes/classification/configs/finetune_smoke.yaml"
    tables = {part: f"data/tasks/classification/{part}.jsonl" for part in ("validation", "test")}
    few = {f"{part}_data": [{"path": path, "split": "train[:64]"}] for part, path in tables.items()}
    few["train_data"] = few["validation_data"]
    shared = yaml.safe_load(smoke.read_text()) | few | {"max_steps": 2, "eval_steps": 1}
    config = tmp_path / "shared.yaml"
    config.write_text(yaml.safe_dump(shared | {"report_to": "none"}))
    values = {
        "script": "recipes/classification/finetune.py",
        "config": config,
        "settings": {"model.num_hidden_layers": [1]},
        "method": "grid",
        "output_dir": tmp_path / "search",
    }
    ended = call(tuning.main, command_line(values), tmp_path / "search")
    assert ended.status == 0, ended.output + ended.error
    (record,) = records(ended.folder)
    assert [step for step, _ in record["evaluations"]] == [1, 2]
    assert record["value"] == max(value for _, value in record["evaluations"])
    assert (ended.folder / "plots/search.png").read_bytes().startswith(b"\x89PNG")
    trial = ended.folder / "trials/trial-001"
    before = (trial / "metrics.jsonl").read_text()
    assert "test_accuracy" not in before
    best = call(finetune.main, [str(ended.folder / "best.yaml")], trial)
    assert best.status == 0, best.output + best.error
    after = (trial / "metrics.jsonl").read_text()
    assert after.startswith(before)  # nothing was trained or evaluated again
    assert "test_accuracy" in after.removeprefix(before)
