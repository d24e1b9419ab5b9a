"""Runs that are killed, told to stop or fed with NaN, and what becomes of them."""

import bisect
import itertools
import math
import random
import signal
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from launching import (
    CAUSAL_LM,
    Launch,
    checkpoints,
    metrics,
    run,
    start_server,
    state,
    steps,
    tiny_run,
)

from utils.sources import Source
from utils.stream import Corpus, StreamArguments

STEPS, SAVE_STEPS = 12, 3
SETTINGS = {
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "eval_steps": 4,
    "weight_decay": 0.5,
    "warmup_steps": 5,
}
STAGES = {
    "no DeepSpeed": (None, 1),
    "ZeRO-1": ("zero1", 2),
    "ZeRO-2": ("zero2", 2),
    "ZeRO-3": ("zero3", 2),
}


def partial_checkpoints(output_dir: Path) -> list[str]:
    return [path.name for path in output_dir.glob("checkpoints/.step-*.partial")]


def kill(launch: Launch, output_dir: Path, moment: str, draw: random.Random, usual: float) -> str:
    """Send SIGKILL to all ranks.

    Args:
        moment: "before the first checkpoint", "in a save", "at the end" (of the run, whose last
            checkpoint is complete, and whose export is not) or "at any time".
        usual: seconds from start to end of an undisturbed run.

    Returns:
        What it met: "in a save", "before the first checkpoint", "later", or "" when the run had
        come to its end.
    """
    last = int(checkpoints(output_dir)[-1].name[5:]) if checkpoints(output_dir) else 0
    if moment == "in a save" and last < STEPS:
        save = draw.randrange(last // SAVE_STEPS + 1, STEPS // SAVE_STEPS + 1) * SAVE_STEPS
        name = f".step-{save:08d}.partial"  # or a later one, should this be missed
        launch.wait_until(lambda: max(partial_checkpoints(output_dir), default="") >= name)
    elif moment == "before the first checkpoint":
        launch.wait_for(f"step {draw.randrange(1, SAVE_STEPS)}/")
    elif moment == "at the end":
        launch.wait_until((output_dir / "checkpoints" / f"step-{STEPS:08d}").exists)
    else:
        end = time.monotonic() + draw.uniform(0, usual)
        launch.wait_until(lambda: time.monotonic() > end)
    alive = launch.is_alive()
    launch.kill()
    if not alive:
        return ""
    if partial_checkpoints(output_dir):
        return "in a save"
    return "later" if checkpoints(output_dir) else "before the first checkpoint"


def result(output_dir: Path) -> tuple[list[dict], bytes]:
    """What must be the same, however often a run was interrupted."""
    return metrics(output_dir), (output_dir / "model" / "model.safetensors").read_bytes()


class Runs:
    """Runs of one launch config on the same data; one of them undisturbed."""

    def __init__(self, folder: Path, config: str | None, processes: int, *data: Path, **settings):
        self.folder, self.config, self.processes = folder, config, processes
        self.data, self.settings = data, {**SETTINGS, **settings}
        self.log = folder / "log.txt"
        self.reference = folder / "undisturbed"
        start_server()
        start = time.monotonic()
        self.finish(self.reference)
        self.seconds = time.monotonic() - start

    def start(self, output_dir: Path, script: str = CAUSAL_LM, **settings) -> Launch:
        arguments = tiny_run(output_dir, *self.data, **self.settings, **settings)
        return Launch(self.config, self.processes, arguments, self.log, script)

    def finish(self, output_dir: Path) -> str:
        arguments = tiny_run(output_dir, *self.data, **self.settings)
        return run(self.config, self.processes, arguments, self.log)


def script_with(path: Path, function: str, code: str) -> str:
    """A script that runs the recipe with a function of utils replaced.

    Args:
        code: the body of the new function, with `original`, `arguments`, `options`, `rank` and
            `call`, which counts from 1.
    """
    module, _, name = function.rpartition(".")
    path.write_text(f"""
import itertools, os, runpy, signal
import {module} as module
original, calls, rank = module.{name}, itertools.count(1), int(os.environ.get("RANK", 0))
def replacement(*arguments, **options):
    call = next(calls)
{textwrap.indent(code, "    ")}
module.{name} = replacement
runpy.run_path("{CAUSAL_LM}", run_name="__main__")
""")
    return str(path)


@pytest.fixture(scope="module", params=STAGES)
def runs(request, tmp_path_factory, corpus_folder, tokenizer_folder) -> Runs:
    return Runs(
        tmp_path_factory.mktemp("runs"),
        *STAGES[request.param],
        corpus_folder / "train-*.jsonl",
        tokenizer_folder,
        validation_sources=[{"path": str(corpus_folder / "validation.jsonl")}],
        eval_documents=8,
    )


def test_kills_leave_no_trace_in_metrics_and_weights(runs, tmp_path):
    draw = random.Random(0)
    moments = ["before the first checkpoint", "in a save", "at any time", "at the end"]
    met = []
    for moment in moments:
        with runs.start(tmp_path) as launch:
            met.append(kill(launch, tmp_path, moment, draw, runs.seconds))
    assert met[:2] == moments[:2]
    output = runs.finish(tmp_path)
    assert "continuing" in output
    assert result(tmp_path) == result(runs.reference)
    assert not partial_checkpoints(tmp_path)


@pytest.mark.parametrize("runs", ["ZeRO-2"], indirect=True)
def test_one_killed_process_ends_the_other_and_leaves_no_trace(runs, tmp_path):
    with runs.start(tmp_path) as launch:
        launch.wait_for("step 4/")
        launch.processes[1].kill()
        statuses = launch.wait(60)
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] not in (0, -signal.SIGKILL)
    runs.finish(tmp_path)
    assert result(tmp_path) == result(runs.reference)


MOMENTS = {  # function → what the run does when it is called for the first time
    "utils.engine.initialize_weights": "begins",
    "utils.evaluation.evaluate_by_domain": "evaluates",
    "utils.checkpoint.save_file": "saves",
}


@pytest.mark.parametrize("runs", ["no DeepSpeed", "ZeRO-3"], indirect=True)
def test_a_stop_signal_at_any_moment_stops_all_processes_with_a_checkpoint(runs, tmp_path):
    output_dir = tmp_path / "run"
    # only the last process is told, and all stop
    told = "if call == 1 and rank == LAST:\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    told = told.replace("LAST", str(runs.processes - 1)) + "return original(*arguments, **options)"
    for function, doing in MOMENTS.items():
        script = script_with(tmp_path / f"{doing}.py", function, told)
        with runs.start(output_dir, script) as launch:
            assert launch.wait() == [0] * runs.processes, launch.output()
            assert launch.output().count("resume with: ") == 1
            last_step = steps(output_dir)[-1]["step"] if steps(output_dir) else 0
            assert last_step == {"begins": 0, "evaluates": 4, "saves": 6}[doing]
            assert f"stopped after step {last_step}" in launch.output()
        if doing != "begins":
            assert int(checkpoints(output_dir)[-1].name[5:]) == last_step
    with runs.start(output_dir) as launch:
        launch.wait_for("step 7/")
        launch.signal(signal.SIGUSR1)
        assert launch.wait() == [0] * runs.processes, launch.output()
    assert "SIGUSR1: stopping after this step" in launch.output()
    assert "resume with: " in launch.output()
    runs.finish(output_dir)
    assert result(output_dir) == result(runs.reference)


def data_workers(launch: Launch) -> list[psutil.Process]:
    return [
        worker
        for process in launch.processes
        for worker in psutil.Process(process.pid).children()
        if "resource_tracker" not in " ".join(worker.cmdline())
    ]


@pytest.mark.parametrize("runs", ["ZeRO-2"], indirect=True)
def test_dead_data_workers_are_reported_and_do_not_hinder_a_stop(runs, tmp_path):
    with runs.start(tmp_path, dataloader_num_workers=1) as launch:
        launch.wait_for("step 4/")
        workers = data_workers(launch)
        workers[1].kill()
        assert launch.wait() == [2, 2], launch.output()
    assert launch.output().count("error: ") == 1
    assert f"error: DataLoader worker (pid(s) {workers[1].pid}) exited" in launch.output()
    last_step = steps(tmp_path)[-1]["step"]
    assert checkpoints(tmp_path)[-1].name == f"step-{last_step:08d}"

    with runs.start(tmp_path, dataloader_num_workers=1) as launch:
        launch.wait_for(f"step {last_step + 1}/")
        for worker in data_workers(launch):
            worker.terminate()
        launch.signal(signal.SIGTERM)
        assert launch.wait() == [0, 0], launch.output()
    assert "resume with: " in launch.output()
    runs.finish(tmp_path)
    assert result(tmp_path) == result(runs.reference)


NAN = """
loss, step = original(*arguments), (call - 1) // 2 + 1  # of two micro-batches
if rank == 1 and step == 2:
    return loss * float("nan")
if rank == 1 and step in (4, 6, 7, 8):  # the loss is finite, its gradient is not
    loss.register_hook(lambda gradient: gradient * float("nan"))
return loss
"""


@pytest.mark.parametrize(
    ("config", "mixed_precision"),
    [
        ("multi_cpu", "no"),
        ("zero1", "no"),
        ("zero2", "no"),
        ("zero3", "no"),
        ("zero1", "bf16"),
        ("zero2", "bf16"),
        ("zero3", "bf16"),
    ],
)
def test_nan_on_one_process_is_skipped_by_all_and_stops_the_run_in_the_end(
    config, mixed_precision, tmp_path, corpus_folder, tokenizer_folder
):
    script = script_with(tmp_path / "nan.py", "utils.loss.summed_cross_entropy", NAN)
    settings = {"max_steps": 20, "save_steps": 1, "keep_last": 20, "max_skipped_steps": 3}
    data = corpus_folder / "train-*.jsonl", tokenizer_folder
    arguments = tiny_run(tmp_path, *data, **settings, mixed_precision=mixed_precision)
    with Launch(config, 2, arguments, tmp_path / "log.txt", script) as launch:
        assert launch.wait() == [2, 2], launch.output()
    error = [line for line in launch.output().splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert error[0].startswith("error: 3 steps in a row, up to step 8, were skipped")
    records = steps(tmp_path)
    assert [r["step"] for r in records] == list(range(1, 9))
    assert [r["step"] for r in records if r.get("skipped")] == [2, 4, 6, 7, 8]
    assert [r["step"] for r in records if not math.isfinite(r["loss"])] == [2]
    # a skipped step leaves weights and moments as they were
    folders = checkpoints(tmp_path)
    for before, after in ((1, 2), (3, 4), (5, 6), (6, 7)):
        for path in folders[before - 1].glob("rank-*"):
            assert path.read_bytes() == (folders[after - 1] / path.name).read_bytes()
    assert state(folders[-1])["optimizer_step"] == 3


def test_a_process_that_cannot_write_stops_all_with_the_last_good_checkpoint(
    tmp_path, corpus_folder, tokenizer_folder
):
    code = """
if rank == 1 and call == 2:
    raise OSError(28, "No space left on device")
return original(*arguments, **options)
"""
    script = script_with(tmp_path / "full.py", "utils.checkpoint.save_file", code)
    folder, data = tmp_path / "run", (corpus_folder / "train-*.jsonl", tokenizer_folder)
    arguments = tiny_run(folder, *data, max_steps=9, save_steps=3)
    with Launch("zero1", 2, arguments, tmp_path / "log.txt", script) as launch:
        assert launch.wait() == [2, 2], launch.output()
    assert launch.output().count("error: ") == 1
    assert "No space left on device. The last good checkpoint is" in launch.output()
    assert [path.name for path in checkpoints(folder)] == ["step-00000003"]
    assert not partial_checkpoints(folder)
    assert "finished" in run("zero1", 2, arguments, tmp_path / "log.txt")
    assert [record["step"] for record in steps(folder)] == list(range(1, 10))


def test_a_broken_record_of_one_process_stops_all_with_a_checkpoint_and_one_message(
    tmp_path, corpus_folder, tokenizer_folder
):
    lines = (corpus_folder / "train-0.jsonl").read_bytes().splitlines(keepends=True)
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"".join(lines))
    corpus = Corpus([Source(str(path))], len, StreamArguments(lanes=8), seed=0)
    (eighth,) = corpus.shards_of(0, epoch=0, lane=1)  # a lane of process 1
    ends = list(itertools.accumulate(map(len, lines)))
    place = bisect.bisect(ends, (eighth + 0.5) / 8 * ends[-1])
    lines[place] = b"{broken\n" + lines[place][8:]
    path.write_bytes(b"".join(lines))
    settings = {"max_steps": 100, "save_steps": 50, "shuffle_documents": 2}
    arguments = tiny_run(tmp_path / "run", path, tokenizer_folder, **settings)
    with Launch("zero2", 2, arguments, tmp_path / "log.txt") as launch:
        assert launch.wait() == [2, 2], launch.output()
    assert launch.output().count("error: ") == 1
    assert f"error: {path}, line {place + 1}" in launch.output()
    last_step = steps(tmp_path / "run")[-1]["step"]
    assert last_step > 1
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{last_step:08d}"
