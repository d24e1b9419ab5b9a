import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from conftest import Ended
from launching import Launch, metrics, tiny_run
from programs import ROOT
from utils import files
from utils.arguments import TrainingArguments
from utils.config import InputError, parse
from utils.files import written_aside
from utils.integrity import changed_files, describe_files, locked
from utils.run_folder import FILES, FOLDERS, RunFolder


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(str(tmp_path / "a" / "run"))
    folder.begin(TrainingArguments(), 0)
    return folder


def test_nothing_is_written_before_the_run_begins(tmp_path):
    folder = RunFolder(str(tmp_path / "a" / "run"))
    assert not folder.is_finished(TrainingArguments(max_steps=5), [])
    assert folder.newest_checkpoint() is None
    assert folder.metrics_size() == 0
    assert folder.records() == []
    assert [path.name for path in folder.path.iterdir()] == [".lock"]
    folder.lock.close()
    assert not list(tmp_path.iterdir())
    folder = RunFolder(str(tmp_path / "a" / "run"))
    folder.begin(TrainingArguments(), 0)
    folder.lock.close()
    assert {path.name for path in folder.path.iterdir()} == {"config.yaml", "metrics.jsonl"}


def test_config_yaml_is_enough_to_run_again(tmp_path):
    settings = TrainingArguments(learning_rate=1e-5, max_steps=7, lr_scheduler_kwargs={"a": 1e-7})
    folder = RunFolder(str(tmp_path))
    folder.begin(settings, 0)
    assert parse(TrainingArguments, [str(tmp_path / "config.yaml")]) == settings


@pytest.mark.parametrize("place", ["file", "file/in it", "link", "link/in it", "fifo"])
def test_an_output_dir_that_cannot_be_one(place, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nothing")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.iterdir())
    name = place.partition("/")[0]
    kind = {"file": "a file", "fifo": "no file"}.get(name, "a link to nothing")
    with pytest.raises(InputError) as error:
        RunFolder(str(tmp_path / place))
    assert str(error.value) == (
        f"output_dir: {tmp_path}/{name} is {kind}, not a folder: "
        "move it away, or choose another output_dir"
    )
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_dir_that_is_a_link_to_itself(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=r"^output_dir: cannot write in .*symbolic links$"):
        RunFolder(str(tmp_path / "loop"))


@pytest.mark.parametrize("name", ["n" * 256, "/".join(["n" * 200] * 21), "/".join(["n" * 99] * 40)])
def test_an_output_dir_with_too_long_a_name(name, tmp_path):
    """The last one has room for itself, and none for what a run writes in it."""
    with pytest.raises(InputError, match=r"^output_dir: cannot write in .*: File name too long$"):
        RunFolder(str(tmp_path / name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
@pytest.mark.parametrize("found", ["other", "link", "fifo"])
def test_what_stands_where_a_run_will_write(name, found, tmp_path):
    path, wanted = tmp_path / name, "a folder" if name in FOLDERS else "a file"
    if found == "fifo":
        os.mkfifo(path)
    elif found == "link":
        path.symlink_to("nothing")
    elif name in FOLDERS:
        path.write_text("mine")
    else:
        path.mkdir()
    kind = {"fifo": "no file", "link": "a link to nothing"}.get(
        found, "a file" if name in FOLDERS else "a folder"
    )
    with pytest.raises(InputError) as error:
        RunFolder(str(tmp_path))
    assert str(error.value) == (
        f"output_dir: {path} is {kind}, not {wanted}: move it away, or choose another output_dir"
    )
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_what_a_run_writes_has_the_mode_that_the_umask_gives(pretrain, monkeypatch):
    before = os.umask(0o027)
    monkeypatch.setattr(files, "UMASK", 0o027)
    try:
        ended = pretrain(max_steps=2, save_steps=1)
    finally:
        os.umask(before)
    assert ended.status == 0
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in ended.folder.rglob("*")}
    assert {path.suffix for path in modes} >= {".safetensors", ".json", ".md", ".yaml", ".jsonl"}
    assert {modes[path] for path in modes if path.is_dir()} == {0o750}
    assert {modes[path] for path in modes if path.is_file()} == {0o640}


def test_links_to_what_is_there_are_written_through(tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "run").symlink_to("large disk")
    (tmp_path / "large disk/checkpoints").symlink_to(tmp_path)
    RunFolder(str(tmp_path / "run")).begin(TrainingArguments(max_steps=1), 0)
    assert (tmp_path / "large disk/config.yaml").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_output_dir_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError) as error:
        RunFolder(str(tmp_path / "run"))
    tmp_path.chmod(0o700)
    assert str(error.value) == f"output_dir: cannot write in {tmp_path}: Permission denied"


def test_resume_never(tmp_path):
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    RunFolder(str(tmp_path))
    with pytest.raises(InputError, match="step-00000003 exists and resume is 'never': choose"):
        RunFolder(str(tmp_path), "never")
    (tmp_path / "checkpoints" / "step-00000003").rename(tmp_path / "checkpoints" / ".partial")
    RunFolder(str(tmp_path), "never")


def test_metrics_are_cut_back_to_what_a_checkpoint_has_seen(folder):
    for step in range(3):
        folder.record({"step": step})
    size = folder.metrics_size()
    folder.record({"step": 2, "eval_loss": 1.0})
    with folder.metrics.open("a") as file:
        file.write('{"step": 3, "lo')  # a kill in the midst of a line
    assert folder.records() == [
        {"step": 0},
        {"step": 1},
        {"step": 2},
        {"step": 2, "eval_loss": 1.0},
    ]
    folder.begin(TrainingArguments(), size)
    assert folder.records() == [{"step": 0}, {"step": 1}, {"step": 2}]
    folder.record({"step": 3})
    assert folder.records()[-1] == {"step": 3}
    text = folder.metrics.read_text()
    folder.begin(TrainingArguments(), 10**6)  # a file that someone has shortened stays as it is
    assert folder.metrics.read_text() == text
    folder.begin(TrainingArguments(), 0)
    assert folder.records() == []


def test_what_is_not_finite_is_null(folder):
    folder.record({"step": 1, "loss": float("nan"), "by_domain": {"a": float("inf"), "b": 2.5}})
    assert folder.metrics.read_text() == (
        '{"step": 1, "loss": null, "by_domain": {"a": null, "b": 2.5}}\n'
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_no_space_left_for_metrics(folder):
    folder.metrics = Path("/dev/full")
    with pytest.raises(InputError) as error:
        folder.record({"step": 1})
    assert str(error.value) == "cannot write /dev/full: No space left on device"


def test_a_finished_run_says_so(folder, capsys, monkeypatch):
    settings = TrainingArguments(max_steps=5)
    assert not folder.is_finished(settings, ["data"])
    folder.finish(5, "all 5 steps are done", settings, ["data"])
    assert folder.is_finished(settings, ["data"])
    assert capsys.readouterr().out == f"{folder.path} is finished at step 5: all 5 steps are done\n"
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    assert folder.is_finished(settings, ["data"])
    assert capsys.readouterr().out == ""
    (folder.path / "finished.json").write_text("")
    assert not folder.is_finished(settings, ["data"])
    folder.finish(5, "all 5 steps are done", settings, ["data"])
    folder.begin(TrainingArguments(), 0)
    assert not folder.is_finished(TrainingArguments(max_steps=5), [])


LIMITED = TrainingArguments(max_steps=9, early_stopping_patience=2, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        (5, {"max_steps": 10}),
        (5, {"early_stopping_patience": 3}),
        (5, {"early_stopping_patience": None, "learning_rate": 1e-4}),  # for the steps to come
        (5, {"max_steps": None, "max_hours": 1.0}),
    ],
    ids=str,
)
def test_a_finished_run_goes_on_within_other_limits(step, changes, folder):
    folder.finish(step, "because", LIMITED, "data")
    assert not folder.is_finished(replace(LIMITED, **changes), "data")


@pytest.mark.parametrize(
    "changes",
    [
        {"output_dir": "b", "resume": "never", "report_to": "all"},
        {"logging_steps": 3, "save_steps": 2, "keep_last": 1, "keep_every": 4},
        {"per_device_batch_size": 2, "gradient_checkpointing": True, "torch_compile": True},
        {"early_stopping_patience": 3, "max_hours": 1.0, "max_tokens": 10**9},  # all are done
    ],
    ids=str,
)
def test_what_leaves_a_finished_run_as_it_is(changes, folder):
    folder.finish(9, "all 9 steps are done", LIMITED, "data")
    before = (folder.path / "config.yaml").read_bytes()
    assert folder.is_finished(replace(LIMITED, **changes), "data")
    assert (folder.path / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rate": 2e-3}, "learning_rate 0.001, this is 0.002"),
        ({"learning_rate": 2e-3, "save_steps": 1}, "learning_rate 0.001, this is 0.002"),
        ({"optim": "adamw_bnb_8bit"}, "optim adamw_torch_fused, this is adamw_bnb_8bit"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_kwargs.a None, this is 1"),
        ({"max_steps": 6}, "max_steps 9, this is 6"),
        ({"eval_steps": 3}, "eval_steps None, this is 3"),
    ],
    ids=str,
)
def test_a_finished_run_with_other_settings_is_refused(changes, told, folder):
    """It would train nothing and describe itself as if it had."""
    folder.finish(9, "all 9 steps are done", LIMITED, "data")
    with pytest.raises(InputError) as error:
        folder.is_finished(replace(LIMITED, **changes), "data")
    assert str(error.value) == (
        f"{folder.path} is finished with {told}: choose another output_dir, or change it back"
    )


def test_a_finished_run_with_other_data_is_refused(folder):
    data = {"lanes": 64, "shuffle_documents": 512, "shuffle_bytes": 9, "sources and files": "a"}
    folder.finish(9, "all 9 steps are done", LIMITED, data)
    with pytest.raises(InputError, match=r"with the training data\.lanes 64, this is 32: choose"):
        folder.is_finished(LIMITED, data | {"lanes": 32})
    # as it was once described
    folder.finish(9, "all 9 steps are done", LIMITED, ["a", 64, 512, 9])
    assert folder.is_finished(LIMITED, data)
    with pytest.raises(InputError, match=r"with the training data\.sources and files a, this is b"):
        folder.is_finished(LIMITED, data | {"sources and files": "b"})


def test_settings_that_were_not_known_yet_do_not_matter(folder):
    folder.finish(9, "all 9 steps are done", LIMITED, "data")
    end = json.loads((folder.path / "finished.json").read_text())
    del end["run"][0]["torch_compile"], end["run"][0]["l1_decay"]
    end["run"][0]["of old"] = 1
    (folder.path / "finished.json").write_text(json.dumps(end))
    assert folder.is_finished(LIMITED, "data")


def test_half_written_checkpoints_are_removed(folder):
    kept = folder.path / "checkpoints" / "step-00000001"
    for path in (kept, folder.path / "checkpoints" / ".step-00000002.partial"):
        path.mkdir(parents=True)
        (path / "state.json").write_text("{}")
    folder.begin(TrainingArguments(), 0)
    assert list((folder.path / "checkpoints").iterdir()) == [kept]


# one run at a time

HOLDER = """
import multiprocessing, os, subprocess, sys, time
from utils.run_folder import RunFolder

if __name__ == "__main__":
    folder = RunFolder(sys.argv[1])
    contexts = map(multiprocessing.get_context, ("fork", "spawn"))
    children = [context.Process(target=time.sleep, args=[60]) for context in contexts]
    for child in children:
        child.start()
    print(*(child.pid for child in children), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """start(path): another process with a run there, and with children that outlive it."""
    processes = []

    def start(path: Path) -> subprocess.Popen:
        (tmp_path / "holder.py").write_text(HOLDER)
        command = [sys.executable, tmp_path / "holder.py", path]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        processes.append(process)
        process.children = [*map(int, process.stdout.readline().split())]
        processes.extend(map(psutil.Process, process.children))
        return process

    yield start
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def refusal(path: Path, pid: int) -> str:
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"
    return (
        rf"{path} is in use by process {pid} on {socket.gethostname()}, since {time}: wait for it, "
        rf"stop it, or write elsewhere\. If there is no such process any more, remove {path}/\.lock"
    )


def test_a_run_of_another_process_keeps_the_folder_until_it_dies(holder, tmp_path):
    path = tmp_path / "run"
    process = holder(path)
    for _ in range(2):
        with pytest.raises(InputError) as error:
            RunFolder(str(path))
        assert re.fullmatch(refusal(path, process.pid), str(error.value))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert all(map(psutil.pid_exists, process.children))
    assert (path / ".lock").exists()
    RunFolder(str(path)).lock.close()
    assert not list(path.iterdir())


def test_two_runs_of_one_process_come_after_each_other(tmp_path):
    path = tmp_path / "run"
    first = RunFolder(str(path))
    first.begin(TrainingArguments(), 0)
    before = (path / ".lock").read_bytes()
    for name in (path, tmp_path / "link", path / ".." / "run"):
        if not name.exists():
            name.symlink_to(path)
        with pytest.raises(InputError) as error:
            RunFolder(str(name))
        assert f"{name} is in use by process {os.getpid()} on " in str(error.value)
    assert (path / ".lock").read_bytes() == before
    first.check()
    first.lock.close()
    second = RunFolder(str(path))
    second.itself = second  # what an error leaves: nobody closes it
    del second
    RunFolder(str(path)).begin(TrainingArguments(), 0)


def test_a_lock_that_was_lost_is_taken_again_unless_another_run_has_it(holder, folder):
    lock = folder.path / ".lock"
    code = f"import fcntl; fcntl.lockf(open({str(lock)!r}, 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    others = [sys.executable, "-c", code]
    lock.read_bytes()  # a process that closes a file loses its locks on it
    assert subprocess.run(others).returncode == 0
    lock.read_bytes()
    folder.record({"step": 1})
    assert subprocess.run(others, stderr=subprocess.DEVNULL).returncode == 1
    lock.read_bytes()
    holder(folder.path)
    with pytest.raises(InputError, match=f"{lock} is not of this run any more"):
        folder.record({"step": 2})
    assert folder.records() == [{"step": 1}]


def test_a_folder_that_was_replaced_is_seen_and_left_alone(holder, folder):
    lock = folder.path / ".lock"
    shutil.rmtree(folder.path)
    with pytest.raises(InputError, match=f"{folder.path} was removed or replaced"):
        folder.record({"step": 3})
    assert not folder.path.exists()
    process = holder(folder.path)
    before = lock.read_bytes()
    for write in (
        lambda: folder.record({"step": 3}),
        lambda: folder.begin(TrainingArguments(), 0),
        folder.check,
    ):
        with pytest.raises(InputError, match=f"{folder.path} was removed or replaced"):
            write()
    folder.lock.close()  # what is another run's stays
    assert [path.name for path in folder.path.iterdir()] == [".lock"]
    assert lock.read_bytes() == before
    with pytest.raises(InputError, match=f"in use by process {process.pid} on"):
        RunFolder(str(folder.path))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_and_used(number, tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    path = tmp_path / "run"
    folder = RunFolder(str(path))
    folder.begin(TrainingArguments(), 0)
    folder.record({"step": 1})
    told = f"{path}/.lock: {os.strerror(number)}: nothing keeps a second start out"
    assert capsys.readouterr().err == f"warning: {told}\n"
    folder.lock.close()
    assert not (path / ".lock").exists()


@pytest.mark.parametrize("target", ["mine", "none", None])
def test_a_lock_that_cannot_be_one(target, tmp_path):
    (tmp_path / "mine").write_text("mine")
    lock = tmp_path / ".lock"
    lock.symlink_to(target) if target else lock.mkdir()
    with pytest.raises(InputError, match=rf"^output_dir: cannot write {lock}: "):
        RunFolder(str(tmp_path))
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "none").exists()
    lock.unlink() if target else lock.rmdir()
    RunFolder(str(tmp_path))


def test_a_second_start_leaves_the_first_one_alone(pretrain, monkeypatch):
    """While the first one evaluates, and with another learning rate."""
    from recipes.causal_lm import pretrain as causal_lm

    whole = pretrain("whole", max_steps=4, save_steps=2, eval_steps=2)
    evaluates, ended = causal_lm.Training.evaluates, []

    def start_again(training):
        monkeypatch.setattr(causal_lm.Training, "evaluates", evaluates)
        before = {p: p.read_bytes() for p in training.folder.path.rglob("*") if p.is_file()}
        with pytest.raises(InputError, match="is in use by process"):
            RunFolder(str(training.folder.path))
        ended.append({p: p.read_bytes() for p in before} == before)
        return evaluates(training)

    monkeypatch.setattr(causal_lm.Training, "evaluates", start_again)
    first = pretrain(max_steps=4, save_steps=2, eval_steps=2)
    assert (first.status, ended) == (0, [True]), first.error
    assert metrics(first.folder) == metrics(whole.folder)
    assert not (first.folder / ".lock").exists()


def test_a_second_start_on_two_processes_is_one_message(
    pretrain, tmp_path, corpus_folder, tokenizer_folder
):
    first = pretrain(max_steps=2, save_steps=1)
    before = {p: p.read_bytes() for p in first.folder.rglob("*") if p.is_file()}
    settings = {"max_steps": 4, "learning_rate": 1.0}
    data = corpus_folder / "train-0.jsonl", tokenizer_folder
    words = tiny_run(first.folder, *data, **settings)
    (first.folder / "finished.json").rename(tmp_path / "finished.json")
    holding = RunFolder(str(first.folder))
    with Launch("multi_cpu", 2, words, tmp_path / "log.txt") as launch:
        assert launch.wait(60) == [2, 2], launch.output()
    (line,) = (line for line in launch.output().splitlines() if "error" in line.lower())
    assert re.fullmatch(f"error: {refusal(first.folder, os.getpid())}", line)
    holding.lock.close()
    (tmp_path / "finished.json").rename(first.folder / "finished.json")
    assert {p: p.read_bytes() for p in first.folder.rglob("*") if p.is_file()} == before


def test_a_run_whose_folder_was_replaced_ends_and_leaves_the_new_one_alone(pretrain, monkeypatch):
    from recipes.causal_lm import pretrain as causal_lm

    evaluates = causal_lm.Training.evaluates

    def replace_folder(training):
        monkeypatch.setattr(causal_lm.Training, "evaluates", evaluates)
        shutil.rmtree(training.folder.path)
        training.folder.path.mkdir()
        (training.folder.path / ".lock").write_text("of another run")
        return evaluates(training)

    monkeypatch.setattr(causal_lm.Training, "evaluates", replace_folder)
    ended = pretrain(max_steps=6, save_steps=2)
    assert ended.status == 2
    assert ended.error.count("error: ") == 1
    assert f"{ended.folder} was removed or replaced" in ended.error
    assert [path.name for path in ended.folder.iterdir()] == [".lock"]
    assert (ended.folder / ".lock").read_text() == "of another run"


def test_what_is_refused_after_the_lock_was_taken_leaves_nothing(pretrain, tmp_path):
    refused = pretrain("a/b", model={"model_type": "mamba", "hidden_size": 32})
    assert refused.status == 2, refused.error
    assert "cannot keep packed documents apart" in refused.error
    assert not (tmp_path / "a").exists()


def test_one_process_at_a_time_writes_a_folder(tmp_path):
    with locked(tmp_path / "a" / "model"):
        with pytest.raises(InputError, match=rf"{tmp_path}/a/model is in use by process"):
            locked(tmp_path / "a" / "model")
        with locked(tmp_path / "a" / "other"):
            pass
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a" / "model"):
        assert [path.name for path in (tmp_path / "a").iterdir()] == [".model.lock"]


# written_aside


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.json"
    with written_aside(path) as aside:
        aside.write_text("first")
        assert not path.exists()
    with contextlib.suppress(RuntimeError), written_aside(path) as aside:
        aside.write_text("sec")
        assert path.read_text() == "first"
        raise RuntimeError
    assert path.read_text() == "first"
    (tmp_path / ".file.json.partial").write_text("left by a kill")
    with written_aside(path) as aside:
        assert not aside.exists()
        aside.write_text("third")
    assert path.read_text() == "third"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model"
    for content in ("first", "second"):
        with written_aside(path) as aside:
            aside.mkdir()
            (aside / content).write_text(json.dumps(content))
    assert [p.name for p in path.iterdir()] == ["second"]
    with contextlib.suppress(RuntimeError), written_aside(path) as aside:
        aside.mkdir()
        (aside / "third").write_text("")
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_there_until_the_new_one_stands(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "first").write_text("")
    rename = os.replace

    def replace_and_stop(source, target):
        monkeypatch.undo()
        rename(source, target)
        assert (target.name, os.listdir(target)) == (".model.previous", ["first"])
        raise KeyboardInterrupt  # when the old folder has made room

    def write(name: str) -> None:
        with written_aside(path) as aside:
            aside.mkdir()
            (aside / name).write_text("")

    monkeypatch.setattr(os, "replace", replace_and_stop)
    with pytest.raises(KeyboardInterrupt):
        write("second")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["first", "model"]
    path.rename(tmp_path / ".model.previous")  # what a kill leaves
    with pytest.raises(RuntimeError), written_aside(path):
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["first", "model"]
    path.rename(tmp_path / ".model.previous")
    write("third")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["model", "third"]


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "kept").write_text("")
    (tmp_path / "model").symlink_to("disk")
    with written_aside(tmp_path / "model") as aside:
        aside.mkdir()
    assert not (tmp_path / "model").is_symlink()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["disk", "kept", "model"]


def test_training_files_that_change_between_starts_are_named(pretrain, corpus_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(corpus_folder, data)
    file = data / "train-0.jsonl"
    content = file.read_bytes()

    def start(steps: int, verify: str = "size") -> Ended:
        sources = json.dumps([{"path": str(file)}])
        return pretrain(max_steps=steps, train_sources=sources, verify_sources=verify)

    ended = start(2, "hash")
    assert ended.status == 0, ended.error
    os.utime(file, (1, 1))  # as a copy has it
    ended = start(3, "hash")
    assert ended.status == 0, ended.error
    file.write_bytes(content[:-20] + content[-20:].swapcase())
    ended = start(4, "hash")
    assert ended.status == 2
    assert "train-0.jsonl has another checksum. Change it back" in ended.error
    ended = start(4)
    assert ended.status == 0
    assert "train-0.jsonl was written again, with as many bytes" in ended.error
    file.write_bytes(content + content.splitlines(keepends=True)[0])
    ended = start(5)
    assert ended.status == 2
    assert f"train-0.jsonl had {len(content):,} bytes and has" in ended.error
    assert "Change it back" in ended.error


def test_files_are_described_by_name_where_it_tells_them_apart(tmp_path):
    for name in ("a/x.jsonl", "b/x.jsonl", "b/y.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    files = [str(tmp_path / name) for name in ("a/x.jsonl", "b/y.jsonl", "gone.jsonl")]
    was = describe_files(files, hashed=False)
    assert was.keys() == {"x.jsonl", "y.jsonl"}
    assert [was["x.jsonl"][0], was["x.jsonl"][2]] == [9, None]
    twice = describe_files([*files, str(tmp_path / "b/x.jsonl")], hashed=True)
    assert twice.keys() == {
        str(tmp_path / name) for name in ("a/x.jsonl", "b/x.jsonl", "b/y.jsonl")
    }
    assert changed_files({}, was) == {} == changed_files(was, was)
    (tmp_path / "b/y.jsonl").write_text("B/Y.jsonl")
    os.utime(tmp_path / "b/y.jsonl", (1, 1))
    now = describe_files(files[1:], hashed=False)
    assert changed_files(was, now) == {
        "x.jsonl": "is gone",
        "y.jsonl": "was written again, with as many bytes",
    }
