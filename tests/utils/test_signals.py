"""Signals and closed terminals: what a run does, says, and gives back."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from conftest import STOP_SIGNALS
from killing import script_with
from launching import CAUSAL_LM, ROOT, Launch, checkpoints, metrics, tiny_run
from recipes.causal_lm import pretrain as causal_lm
from utils import report
from utils.config import InputError, at_end
from utils.ranks import ONE_WISH, Ranks

SCRIPTS = [
    str(path.relative_to(ROOT))
    for path in sorted(ROOT.glob("recipes/*/*.py"))
    if "command(main)" in path.read_text()
]


@pytest.fixture
def embedded(monkeypatch):
    """`main` is a part of another program, with handlers of its own."""
    monkeypatch.setattr(at_end, "is_program", False)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    kinds = [signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler, lambda *_: None]
    for number, handler in zip(STOP_SIGNALS, kinds, strict=True):
        signal.signal(number, handler)
    yield lambda: [signal.getsignal(number) for number in STOP_SIGNALS] == kinds
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def tiny(tmp_path, corpus_folder, tokenizer_folder):
    """tiny(name, **settings): the words of a run in a folder of this name."""
    data = corpus_folder / "train-0.jsonl", tokenizer_folder
    return lambda name="run", **settings: tiny_run(tmp_path / name, *data, **settings)


# it waits in C, where no handler of Python's is called
BLOCKED = """
if call == 3:
    import ctypes
    print("blocked", flush=True)
    ctypes.CDLL(None).sleep(60)  # a signal wakes it
    ctypes.CDLL(None).sleep(60)
return original(*arguments, **options)
"""


def test_a_second_ctrl_c_ends_at_once_whatever_the_run_waits_for(tmp_path, tiny):
    words = tiny(max_steps=6, save_steps=2, dataloader_num_workers=1)
    undisturbed = tiny("undisturbed", max_steps=6, save_steps=2)
    script = script_with(tmp_path / "blocked.py", "utils.checkpoint.save_file", BLOCKED)
    with Launch(None, 1, words, tmp_path / "log.txt", script) as launch:
        launch.wait_for("blocked")
        children = psutil.Process(launch.processes[0].pid).children(recursive=True)
        assert len(children) >= 1
        before = launch.output()
        launch.signal(signal.SIGINT)
        launch.wait_for("ends at once\n")
        time.sleep(0.05 + ONE_WISH)
        start = time.monotonic()
        launch.signal(signal.SIGINT)
        assert launch.wait(10) == [130], launch.output()
        psutil.wait_procs(children, timeout=2)
        assert time.monotonic() - start < 2
        assert not any(child.is_running() for child in children)
        assert launch.output().removeprefix(before).splitlines() == [
            "SIGINT: stopping after this step, with a checkpoint; a second Ctrl-C ends at once",
            "SIGINT, then SIGINT: ended at once; the last checkpoint stands",
        ]
    names = [path.name for path in checkpoints(tmp_path / "run")]
    assert names == ["step-00000002", "step-00000004"]
    for arguments in (tiny(max_steps=6, save_steps=2), undisturbed):
        with Launch(None, 1, arguments, tmp_path / "log.txt") as launch:
            assert launch.wait() == [0], launch.output()
    assert metrics(tmp_path / "run") == metrics(tmp_path / "undisturbed")
    weights = [(tmp_path / run / "model/model.safetensors") for run in ("run", "undisturbed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


# a terminal that its reader closes
TERMINAL = f"""
import os, pty, runpy, signal, sys, threading
terminal, of_program = pty.openpty()
for descriptor in (1, 2):
    os.dup2(of_program, descriptor)
os.close(of_program)
sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
def read():
    shown = b""
    while b"step 3/" not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    os.kill(os.getpid(), signal.SIGHUP)
threading.Thread(target=read, daemon=True).start()
runpy.run_path("{CAUSAL_LM}", run_name="__main__")
"""


def test_a_closed_terminal_stops_a_run_with_a_checkpoint(tmp_path, tiny):
    script = tmp_path / "in_terminal.py"
    script.write_text(TERMINAL)
    with Launch(None, 1, tiny(max_steps=100_000), tmp_path / "log.txt", str(script)) as launch:
        assert launch.wait(30) == [0], launch.output()
    last = metrics(tmp_path / "run")[-1]["step"]
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step-{last:08d}"]
    assert launch.output() == ""


def test_a_pipe_that_nobody_reads_any_more_does_not_end_a_run(pretrain, monkeypatch):
    """`recipe.py | tee log`: Ctrl-C ends tee first."""
    reader, writer = os.pipe()
    kept = os.dup(1)
    os.dup2(writer, 1)
    os.close(reader)
    os.close(writer)
    with monkeypatch.context() as patch, open(1, "w", closefd=False) as stdout:
        patch.setattr(sys, "stdout", stdout)
        ended = pretrain(max_steps=2)
    os.dup2(kept, 1)
    os.close(kept)
    assert ended.status == 0, ended.error
    assert (ended.folder / "finished.json").exists()


def test_ctrl_c_during_the_imports_leaves_no_traceback(tmp_path):
    for name in ("torch", "transformers", "tokenizers", "numpy", "yaml"):
        (tmp_path / f"{name}.py").write_text(
            "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
        )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    assert len(SCRIPTS) >= 10
    for words in [*([script] for script in SCRIPTS), ["-m", "utils.export"]]:
        ended = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, timeout=30
        )
        # 130 for a shell
        assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, b"", b""), words


@pytest.mark.parametrize("fails", [False, True], ids=["at its end", "after an error"])
def test_a_run_inside_another_program_gives_the_signals_back(
    fails, embedded, tiny, monkeypatch, call, tmp_path
):
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(sys, "argv", ["recipe.py", *tiny(max_steps=2)])
    if fails:
        monkeypatch.setattr(causal_lm, "conclude", lambda *_: {}["error"])
        with pytest.raises(KeyError) as error:
            causal_lm.main()
        assert error.tb is not None  # it holds the run
    else:
        causal_lm.main()
    AcceleratorState._reset_state(True)
    assert embedded()
    assert signal.set_wakeup_fd(-1) == -1
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_in_another_thread_hears_no_signals(embedded, tiny, monkeypatch, call, tmp_path):
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(sys, "argv", ["recipe.py", *tiny(max_steps=2, dataloader_num_workers=1)])
    thread = threading.Thread(target=causal_lm.main)
    thread.start()
    thread.join()
    AcceleratorState._reset_state(True)
    assert (tmp_path / "run" / "finished.json").exists()
    assert embedded()


def test_what_is_a_second_wish_inside_another_program(embedded, monkeypatch):
    """Signals at once are none, nor SIGTERM after a Ctrl-C, but for that of torchelastic."""
    clock = time.monotonic

    def listen(*numbers):
        with at_end:
            heard = Ranks().signals
            for wait, number in enumerate(numbers):
                monkeypatch.setattr(time, "monotonic", lambda wait=wait: clock() + wait)
                signal.raise_signal(number)
            signal.raise_signal(numbers[-1])
            return heard.first

    sigint, sigterm, _, sighup = (int(STOP_SIGNALS[i]) for i in (1, 0, 2, 3))
    with at_end:
        heard = Ranks().signals
        signal.raise_signal(sigint)
        signal.raise_signal(sigint)
    assert heard.first == sigint
    assert listen(sigterm, sigterm, sighup) == sigterm
    assert listen(sigint, sigterm) == sigint
    for numbers in ([sigint, sigint], [sighup, sigint]):
        with pytest.raises(KeyboardInterrupt):
            listen(*numbers)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert listen(sigterm, sigterm) == sigterm
    with pytest.raises(KeyboardInterrupt):
        listen(sigint, sigterm)
    assert embedded()


def test_nohup_keeps_sighup_away(embedded):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with at_end:
        heard = Ranks().signals
        signal.raise_signal(signal.SIGHUP)
    assert heard.first == 0


def test_a_signal_at_the_end_is_answered_by_what_the_run_does(pretrain, monkeypatch):
    export = report.export

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return export(*arguments)

    monkeypatch.setattr(report, "export", interrupted)
    ended = pretrain(max_steps=2)
    assert ended.status == 0
    model = ended.folder / "model"
    assert f"\nwriting the export: {model}\n" in ended.output
    assert (
        f"\nSIGINT: writing the export: {model}, then the run ends; "
        "a second Ctrl-C ends at once\n" in ended.output
    )
    assert "drawing the plots, writing the card\n" in ended.output
    assert "with a checkpoint" not in ended.output
    assert "\nfinished\n" in ended.output
    assert (model / "model.safetensors").exists()


def test_an_input_error_inside_another_program_gives_the_folder_back(embedded, tiny, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", *tiny(max_steps=2, lanes=7)])
    with pytest.raises(InputError):
        causal_lm.main()
    assert embedded()
