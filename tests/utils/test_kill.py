"""Runs that are killed, told to stop or fed with NaN, and what becomes of them."""

import bisect
import itertools
import json
import random
import signal

import pytest

from conftest import corpus_of
from killing import STAGES, Runs, kill, partial_checkpoints, result, script_with
from launching import CAUSAL_LM, Launch, checkpoints, run, state, steps, tiny_run
from utils.sources import Source


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


HANG = """
if rank == 0 and call == CALL:
    print("here", flush=True)
    time.sleep(600)
return original(*arguments, **options)
"""
# what the first process comes to and does not leave, and the checkpoints, whole and partial, then
HANGS = [
    ("utils.stream.collate", 5, [], []),  # a micro-batch of the second or third step
    (
        "utils.checkpoint.save_file",
        3,
        ["step-00000003", "step-00000004"],
        [".step-00000006.partial"],
    ),
    ("utils.plots.write_plots", 1, ["step-00000009", "step-00000012"], []),
]


def test_kills_leave_no_trace_in_metrics_and_weights(runs, tmp_path):
    output_dir = tmp_path / "run"
    for function, call, whole, partial in HANGS:
        script = script_with(tmp_path / "hang.py", function, HANG.replace("CALL", str(call)))
        with runs.start(output_dir, script) as launch:
            launch.wait_for("here")
            launch.kill()
        assert [path.name for path in checkpoints(output_dir)] == whole
        assert partial_checkpoints(output_dir) == partial
    runs.finish(output_dir)
    assert result(output_dir) == result(runs.reference)


def test_kills_at_random_moments_leave_no_trace_in_metrics_and_weights(runs, tmp_path):
    draw = random.Random(0)
    for _ in range(2):
        with runs.start(tmp_path) as launch:
            kill(launch, tmp_path, "at any time", draw, runs.seconds)
    runs.finish(tmp_path)
    assert result(tmp_path) == result(runs.reference)
    assert not partial_checkpoints(tmp_path)


@pytest.mark.parametrize("runs", ["ZeRO-2"], indirect=True)
def test_one_killed_process_ends_the_other_and_leaves_no_trace(runs, tmp_path):
    code = """
if rank == 1 and call == 9:  # in the fifth step
    os.kill(os.getpid(), signal.SIGKILL)
return original(*arguments, **options)
"""
    script = script_with(tmp_path / "killed.py", "utils.stream.collate", code)
    output_dir = tmp_path / "run"
    with runs.start(output_dir, script) as launch:
        statuses = launch.wait(60)
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] not in (0, -signal.SIGKILL)
    runs.finish(output_dir)
    assert result(output_dir) == result(runs.reference)


@pytest.mark.parametrize("runs", ["ZeRO-3"], indirect=True)
def test_what_one_process_meets_in_an_evaluation_loses_no_step(runs, tmp_path):
    """The other one waits in a forward, which under ZeRO-3 all processes make together."""
    code = """
if rank == 1 and call == 2:
    raise SystemExit(3)
return original(*arguments, **options)
"""
    script = script_with(tmp_path / "raised.py", "bits_per_byte.evaluate_by_domain", code)
    output_dir = tmp_path / "run"
    with runs.start(output_dir, script) as launch:
        assert launch.wait(60)[1] == 3, launch.output()
    assert [path.name for path in checkpoints(output_dir)][-1] == "step-00000008"
    runs.finish(output_dir)
    assert result(output_dir) == result(runs.reference)


# as the documentation of transformers shows them
DEEPSPEED_OF_OTHERS = {
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "reduce_bucket_size": "auto",
    },
    "gradient_accumulation_steps": 2,
    "gradient_clipping": "auto",
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}


@pytest.mark.parametrize("runs", ["ZeRO-2"], indirect=True)
def test_a_deepspeed_config_that_was_written_for_another_trainer(runs, tmp_path):
    config, script, output_dir = tmp_path / "ds.json", tmp_path / "script.py", tmp_path / "run"
    config.write_text(json.dumps(DEEPSPEED_OF_OTHERS))
    script.write_text(f"""
import os, runpy
os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = "{config}"
os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "4"
runpy.run_path("{CAUSAL_LM}", run_name="__main__")
""")
    with runs.start(output_dir, str(script)) as launch:
        assert launch.wait() == [0, 0], launch.output()
    found, expected = steps(output_dir), steps(runs.reference)
    assert [r["learning_rate"] for r in found] == [r["learning_rate"] for r in expected]
    losses = [record["loss"] for record in expected]
    assert [record["loss"] for record in found] == pytest.approx(losses, rel=1e-6)


TOLD = """
if call == 1 and rank in RANKS:
    os.kill(os.getpid(), signal.SIGNAL)
return original(*arguments, **options)
"""
# what the run does when a signal comes, to the last process only or to all, and its last step
SIGNALS = [
    ("utils.model.initialize_weights", "SIGTERM", "last", 0),
    ("bits_per_byte.evaluate_by_domain", "SIGTERM", "last", 4),
    ("utils.checkpoint.save_file", "SIGINT", "last", 6),
    ("chunked_loss.summed_cross_entropy", "SIGUSR1", "all", 7),
    ("utils.checkpoint.save_file", "SIGTERM", "all", 8),
]


@pytest.mark.parametrize("runs", ["no DeepSpeed", "ZeRO-3"], indirect=True)
def test_a_stop_signal_at_any_moment_stops_all_processes_with_a_checkpoint(runs, tmp_path):
    output_dir = tmp_path / "run"
    for function, name, ranks, last_step in SIGNALS:
        told = {"last": [runs.processes - 1], "all": list(range(runs.processes))}[ranks]
        code = TOLD.replace("RANKS", str(told)).replace("SIGNAL", name)
        with runs.start(output_dir, script_with(tmp_path / "told.py", function, code)) as launch:
            assert launch.wait() == [0] * runs.processes, launch.output()
        assert f"stopped after step {last_step}; resume with: " in launch.output()
        assert launch.output().count("resume with: ") == 1
        found = [path.name for path in checkpoints(output_dir)][-1:]
        assert found == ([f"step-{last_step:08d}"] if last_step else [])
    runs.finish(output_dir)
    assert result(output_dir) == result(runs.reference)


DATA_WORKERS = """
if rank == 0 and call == CALL:
    for worker in psutil.Process().children():
        if "resource_tracker" not in " ".join(worker.cmdline()):
            worker.send_signal(signal.SIGNAL)
    if signal.SIGNAL == signal.SIGTERM:
        os.kill(os.getpid(), signal.SIGTERM)
return original(*arguments, **options)
"""


@pytest.mark.parametrize("runs", ["ZeRO-2"], indirect=True)
def test_a_dead_data_worker_stops_all_processes_with_a_checkpoint(runs, tmp_path):
    code = DATA_WORKERS.replace("CALL", "5").replace("SIGNAL", "SIGKILL")
    script = script_with(tmp_path / "kill.py", "utils.stream.collate", code)
    output_dir = tmp_path / "run"
    with runs.start(output_dir, script, dataloader_num_workers=1) as launch:
        assert launch.wait() == [2, 2], launch.output()
    (error,) = (line for line in launch.output().splitlines() if line.startswith("error: "))
    assert error.startswith("error: DataLoader worker (pid(s) ")
    last_step = steps(output_dir)[-1]["step"]
    assert checkpoints(output_dir)[-1].name == f"step-{last_step:08d}"
    runs.finish(output_dir)
    assert result(output_dir) == result(runs.reference)


@pytest.mark.parametrize("runs", ["no DeepSpeed"], indirect=True)
def test_a_stop_signal_to_data_workers_too_stops_the_run_with_a_checkpoint(runs, tmp_path):
    code = DATA_WORKERS.replace("CALL", "17").replace("SIGNAL", "SIGTERM")  # in the fifth step
    script = script_with(tmp_path / "told.py", "chunked_loss.summed_cross_entropy", code)
    output_dir = tmp_path / "run"
    with runs.start(output_dir, script, dataloader_num_workers=1) as launch:
        assert launch.wait() == [0], launch.output()
    assert "stopped after step 5; resume with: " in launch.output()
    runs.finish(output_dir)
    assert result(output_dir) == result(runs.reference)


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
    script = script_with(tmp_path / "nan.py", "chunked_loss.summed_cross_entropy", NAN)
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
    assert [r["step"] for r in records if r["loss"] is None] == [2]
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
    corpus = corpus_of([Source(str(path))], lanes=8)
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
