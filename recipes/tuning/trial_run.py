"""A trial: a run of a training script in a process of its own, watched by what it writes.

Any script will do that keeps to what the recipes here do: `CONFIG --key value …` and
`--print_config`; in its output_dir config.yaml when it begins, metrics.jsonl, and finished.json at
its end; SIGTERM stops it with a checkpoint, and the same command goes on from there.
"""

import ctypes
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trial_records import Metric
from utils.config import InputError, read_yaml
from utils.integrity import Lock
from utils.program import in_brief, say
from utils.ranks import StopSignals

POLL_SECONDS = 0.2
STARTS = 2  # of a trial that somebody kills, in one search
# what a script or Python says last; the launcher's own words tell nothing
SAID = re.compile(r"^(?:\[rank\d+\]: ?)?error: (.+)$", re.M)
RAISED = re.compile(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception)\b(?::.*)?)$", re.M)
OF_THE_LAUNCHER = ("ChildFailedError", "CalledProcessError")
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Outcome(NamedTuple):
    """What a trial has come to."""

    status: str  # complete, pruned, failed or stopped
    reason: str  # of pruning or failing
    evaluations: list[tuple[int, float | None]]  # by step; None: not finite
    seconds: float  # since its last start
    value: float | None = None  # of the metric, once it is complete


def as_words(settings: dict[str, Any]) -> list[str]:
    """As they are typed: `--name value`."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


def resolved_settings(script: str, config: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What the script's settings come to with these.

    Raises:
        InputError: it refuses them, or is no training script.
    """
    words = [sys.executable, script, config, *as_words(settings), "--print_config"]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", env=_path())
    if done.returncode:
        raise InputError(f"{script}: {_reason(done.stderr, done.returncode)}")
    try:
        found = yaml.safe_load(done.stdout)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or "metric_for_best_model" not in found:
        raise InputError(f"script: {script} does not train: its settings have no evaluations")
    return found


def launcher(launch: list[str] | str) -> list[str]:
    """The words before the script; raises InputError where there is no such program."""
    words = shlex.split(launch) if isinstance(launch, str) else launch
    if words and shutil.which(words[0], path=_path()["PATH"]) is None:
        raise InputError(f"launch: there is no program {words[0]!r}")
    return [*words] or [sys.executable]


class Trial:
    """A run of a script, which may have begun before.

    Args:
        command: that runs it.
        folder: its output_dir; beside it lies what the script says, in a .log.
        metric: that evaluations give.
        is_pruned: of the step and the value of each evaluation, in their order: whether it is the
            last.
        signals: of the search.
    """

    def __init__(
        self,
        command: list[str],
        folder: Path,
        metric: Metric,
        is_pruned: Callable[[int, float | None], bool],
        signals: StopSignals,
    ):
        self.command, self.folder, self.metric = command, folder, metric
        self.is_pruned, self.signals = is_pruned, signals
        self.log = folder.with_name(f"{folder.name}.log")
        self.evaluations: list[tuple[int, float | None]] = []
        self.pruned = ""  # why, once it is

    def run(self) -> Outcome:
        """Run it to its end, or on from where it was.

        Raises:
            InputError: the script refuses the settings, or does not measure the metric.
        """
        start, reason = time.monotonic(), ""
        self._wait_for_others()
        self._look()  # a start before this one may have been killed after all was done
        for _ in range(STARTS):
            if not (self.pruned or self._is_finished() or self.signals.first):
                reason = self._launch()
            seconds = round(time.monotonic() - start, 1)
            if self.pruned:
                return Outcome("pruned", self.pruned, self.evaluations, seconds)
            if self._is_finished():
                return self._complete(seconds)
            if self.signals.first:
                return Outcome("stopped", "", self.evaluations, seconds)
            if not reason.startswith("ended by "):
                break
        return Outcome("failed", reason, self.evaluations, seconds)

    def _complete(self, seconds: float) -> Outcome:
        if not self.evaluations:
            raise InputError(f"metric: {self.folder / 'metrics.jsonl'} has no {self.metric.name}")
        value = self.metric.result(self.evaluations)
        if value is None:
            return Outcome("failed", f"{self.metric.name} is not finite", self.evaluations, seconds)
        return Outcome("complete", "", self.evaluations, seconds, value)

    def _wait_for_others(self) -> None:
        """Where a search was killed, its trial may still be writing a checkpoint."""
        is_told = False
        while not self.signals.first:
            try:
                return Lock(self.folder / ".lock", self.folder).close()
            except InputError as error:
                if not is_told:
                    say(f"waiting: {error}")
                is_told = True
                time.sleep(1)
            except OSError as error:
                raise InputError(f"cannot write {error.filename}: {error.strerror}") from None

    def _launch(self) -> str:
        """Start the script and wait for its end; why it ended, where that is known."""
        began, is_told = self._begun(), False
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            place = log.tell()
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_path(),
                start_new_session=True,  # Ctrl-C is for the search, which tells its trial
                preexec_fn=_end_with_the_search,
            )
        while process.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
            self._look()
            if (self.pruned or self.signals.first) and not is_told:
                is_told = True
                _tell(process)
        with self.log.open("rb") as log:
            log.seek(place)
            said = log.read().decode(errors="replace")
        refusal = SAID.search(said)
        if process.returncode and refusal and self._begun() == began:
            raise InputError(f"{self.folder.name}: {in_brief(refusal[1])}")
        return _reason(said, process.returncode)

    def _look(self) -> None:
        """Tell the pruner what evaluations have come; at the last step nothing would be saved."""
        seen = {step for step, _ in self.evaluations}
        for step, value in evaluations(self.folder, self.metric.name):
            if self.pruned or step in seen:
                continue
            shown = "not finite" if value is None else f"{value:.4f}"
            say(f"  step {step}  {self.metric.name} {shown}")
            self.evaluations.append((step, value))
            config, _ = read_yaml(str(self.folder / "config.yaml"))
            if step != config.get("max_steps") and self.is_pruned(step, value):
                self.pruned = f"{shown} at step {step}"

    def _is_finished(self) -> bool:
        return (self.folder / "finished.json").exists()

    def _begun(self) -> Any:
        """Another one after each start that has not refused its settings."""
        file = self.folder / "config.yaml"
        return (file.stat().st_ino, file.stat().st_mtime_ns) if file.exists() else None


def evaluations(folder: Path, metric: str) -> list[tuple[int, float | None]]:
    """(step, value) of those in metrics.jsonl; a line that is being written is left out."""
    file, found = folder / "metrics.jsonl", []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if metric in record:
            value = record[metric]
            is_finite = isinstance(value, int | float) and math.isfinite(value)
            found.append((record["step"], value if is_finite else None))
    return found


def _tell(process: subprocess.Popen) -> None:
    """To stop, also those that a launcher has started: not each passes it on."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def _end_with_the_search() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _reason(said: str, status: int) -> str:
    """Why a script has ended, from what it said."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    if status == 0:
        return "ended by somebody who stopped it"
    errors = [line for line in RAISED.findall(said) if not any(n in line for n in OF_THE_LAUNCHER)]
    lines = [line for line in said.split("\n") if line.strip()]
    return in_brief([*SAID.findall(said), *errors[-1:], *lines[-1:], f"status {status}"][0])


def _path() -> dict[str, str]:
    """The environment, with the programs that are installed beside this Python."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
