"""Faults at random moments: what the runs come to must equal undisturbed ones, bit for bit.

    python tests/soak.py [--tries 240] [--seed 0]

Processes are killed or told to stop, a second run is started in the same folder, the disk is full,
bits of checkpoints flip, the data change. After every few faults a run may finish, and is compared.
The table is written to benchmarks/results/soak.md and .json.
"""

import itertools
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

sys.path.append(str(Path(__file__).parent.parent))  # of benchmarks, which is not installed

from benchmarks.measurement import describe, write_results
from killing import STAGES, STEPS, Runs, met, reach, result
from launching import ROOT, Launch, checkpoints, steps
from utils.config import InputError, command, parse
from utils.report import markdown_table

SAMPLE = ROOT / "data" / "sample"
TOKENIZER = ROOT / "data" / "tokenizers" / "bpe-8192"
PRECISIONS = {"fp32": "no", "bf16": "bf16"}
MOMENTS = ["in a save", "at any time", "at any time", "at the end", "before the first checkpoint"]
FAULTS_OF_A_RUN = 5
AFTER_ITS_BEGIN = 0.4  # of the time of a run
SECONDS = 60  # a run that has not ended by then hangs


@dataclass
class Arguments:
    """Disturb runs again and again, let them finish, and compare them with undisturbed ones."""

    tries: int = 240  # over all faults, stages and precisions together
    seed: int = 0  # of the faults and the moments
    results: str = "benchmarks/results/soak"


class Run(NamedTuple):
    """One that is disturbed, continued and disturbed again."""

    runs: Runs
    output_dir: Path
    draw: random.Random

    def reach(self, launch: Launch, share: float = 1) -> bool:
        """Whether the launch has come to the moment that was drawn, and not to its end.

        Args:
            share: of the time of a run that may still pass.
        """
        moments = MOMENTS[:-1] if checkpoints(self.output_dir) else MOMENTS
        moment = self.draw.choice(moments)
        return reach(launch, self.output_dir, moment, self.draw, share * self.runs.seconds)

    def kill(self) -> Path | None:
        """Continue it and kill it; its newest checkpoint then, which the next start reads."""
        with self.runs.start(self.output_dir) as launch:
            self.reach(launch)
        (self.output_dir / "finished.json").unlink(missing_ok=True)
        return max(checkpoints(self.output_dir), default=None)


class Found(NamedTuple):
    """What a fault met, and what became of it."""

    moment: str
    outcome: str
    problem: str = ""  # what should not have been: silence, a traceback, a hang


def ended(launch: Launch, statuses: list[int], allowed: dict[int, str]) -> tuple[str, str]:
    """(outcome, problem) of a launch; `allowed`: outcomes by status."""
    output = launch.output()
    outcome = allowed.get(statuses[0], f"status {statuses[0]}")
    if len({*statuses}) > 1 or statuses[0] not in allowed:
        return outcome, f"statuses {statuses}: {output[-2000:]}"
    if "Traceback" in output:
        return outcome, f"a traceback: {output[-2000:]}"
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if statuses[0] == 2 and len(errors) != 1:
        return outcome, f"not one line: {output[-2000:]}"
    return outcome, ""


def kill_all(run: Run) -> Found:
    with run.runs.start(run.output_dir) as launch:
        is_alive = run.reach(launch)
        launch.kill()
        return Found(met(run.output_dir), "killed" if is_alive else "came to its end before")


def begin(launch: Launch) -> None:
    """Wait until the processes have found each other; till then only a launcher ends them all."""
    launch.wait_until(lambda: re.search("^(step|continuing|stopped) ", launch.output(), re.M))


def kill_one(run: Run) -> Found:
    with run.runs.start(run.output_dir) as launch:
        begin(launch)
        is_alive = run.reach(launch, AFTER_ITS_BEGIN)
        moment = met(run.output_dir)
        launch.processes[-1].kill()
        hung = [status for status in launch.wait(SECONDS)[:-1] if status == -signal.SIGKILL]
        problem = "the others hung" if hung else ""
        return Found(moment, "killed" if is_alive else "came to its end before", problem)


def stop(numbers: list[int], run: Run) -> Found:
    """Send signals, one a second."""
    with run.runs.start(run.output_dir) as launch:
        begin(launch)
        run.reach(launch, AFTER_ITS_BEGIN)
        moment = met(run.output_dir)
        for wait, number in enumerate(numbers):
            time.sleep(wait)
            launch.signal(number)
        allowed = {0: "stopped, or at its end: status 0", 130: "interrupted: status 130"}
        return Found(moment, *ended(launch, launch.wait(SECONDS), allowed))


def start_again(run: Run) -> Found:
    """Two starts in one folder, almost at once; the second one with another learning rate."""
    with run.runs.start(run.output_dir) as first:
        time.sleep(run.draw.uniform(0, run.runs.seconds / 4))
        log = run.runs.folder / "second.txt"
        with run.runs.start(run.output_dir, log=log, learning_rate=1.0) as second:
            statuses = {launch: launch.wait(SECONDS) for launch in (second, first)}
        # whoever comes first to the folder has it
        refused = second if 2 in statuses[second] or 0 in statuses[first] else first
        other = first if refused is second else second
        outcome, problem = ended(refused, statuses[refused], {2: "one is refused: status 2"})
        # or the other one has come to its end by then, with another learning rate
        if not re.search("is in use by process|is finished with learning_rate", refused.output()):
            problem = problem or f"no word of the other: {refused.output()[-2000:]}"
        problem = problem or ended(other, statuses[other], {0: ""})[1]
        if other is second:  # a run of another learning rate, which is none to continue
            shutil.rmtree(run.output_dir)
        return Found("at the start", outcome, problem)


def fill_disk(run: Run) -> Found:
    """Files take some more bytes, and no more."""
    with run.runs.start(run.output_dir) as launch:
        run.reach(launch)
        moment = met(run.output_dir)
        limit = run.draw.choice((4_000, 20_000, 100_000, 500_000))
        for process in launch.processes:
            if process.is_alive():
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, -1))
        allowed = {0: "had room: status 0", 2: "says what it could not write: status 2"}
        return Found(moment, *ended(launch, launch.wait(SECONDS), allowed))


def damage(change: Callable[[Path, random.Random], None], run: Run) -> Found:
    """A file of the newest checkpoint."""
    newest = run.kill()
    if newest is None:
        return Found("before the first checkpoint", "nothing to damage")
    file = run.draw.choice(sorted(newest.iterdir()))
    change(file, run.draw)
    found = refused(run, file.name)
    shutil.rmtree(newest)  # as it says
    return found


def refused(run: Run, name: str) -> Found:
    """A start that must name a file and train nothing."""
    with run.runs.start(run.output_dir) as launch:
        statuses = launch.wait(SECONDS)
        outcome, problem = ended(launch, statuses, {2: "refused by name: status 2"})
        if not problem and name not in launch.output():
            problem = f"{name} is not named: {launch.output()[-2000:]}"
        return Found("at a start", outcome, problem)


def flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(file: Path, draw: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])


def remove(file: Path, draw: random.Random) -> None:
    file.unlink()


def change_data(run: Run) -> Found:
    """A file of the source is replaced, grows, is cut, goes or comes; then all is as it was."""
    if run.kill() is None:
        return Found("before the first checkpoint", "nothing to continue")
    data = run.runs.data[0].parent
    file = run.draw.choice(sorted(data.glob("train-*.jsonl")))
    kept = run.runs.folder / "kept.jsonl"
    shutil.copy2(file, kept)
    change = run.draw.choice((flip, cut, remove, grow, add))
    change(file, run.draw)
    found = refused(run, "train-new.jsonl" if change is add else file.name)
    shutil.copy2(kept, file)
    (data / "train-new.jsonl").unlink(missing_ok=True)
    return found


def grow(file: Path, draw: random.Random) -> None:
    with file.open("a") as stream:
        stream.write('{"text": "one more"}\n')


def add(file: Path, draw: random.Random) -> None:
    shutil.copy2(file, file.with_name("train-new.jsonl"))


# of a hundred tries, so many
FAULTS = {
    "SIGKILL to all processes": (32, kill_all),
    "SIGKILL to one process": (6, kill_one),
    "SIGTERM": (6, partial(stop, [signal.SIGTERM])),
    "SIGHUP": (6, partial(stop, [signal.SIGHUP])),
    "SIGUSR1": (4, partial(stop, [signal.SIGUSR1])),
    "Ctrl-C": (6, partial(stop, [signal.SIGINT])),
    "Ctrl-C twice": (6, partial(stop, [signal.SIGINT, signal.SIGINT])),
    "a second start in the folder": (8, start_again),
    "no space left": (8, fill_disk),
    "a flipped bit in a checkpoint": (8, partial(damage, flip)),
    "a cut file in a checkpoint": (3, partial(damage, cut)),
    "a lost file of a checkpoint": (3, partial(damage, remove)),
    "changed data": (4, change_data),
}


@dataclass
class Row:
    """What was done and found of one fault."""

    fault: str
    tries: int = 0
    moments: Counter = field(default_factory=Counter)
    outcomes: Counter = field(default_factory=Counter)
    lost: int = 0  # steps that a finished run has not made
    twice: int = 0  # steps that it has made more than once
    problems: list[str] = field(default_factory=list)

    @property
    def cells(self) -> list[str]:
        met, outcomes = (
            ", ".join(f"{what}: {count}" for what, count in counter.most_common())
            for counter in (self.moments, self.outcomes)
        )
        counts = map(str, (self.lost, self.twice, len(self.problems)))
        return [self.fault, str(self.tries), met, outcomes, *counts]


def soak(
    layout: tuple[str, str],
    faults: list[str],
    rows: dict[str, Row],
    seed: int,
    folder: Path,
    progress: Callable[[str], None],
) -> int:
    """Disturb runs under one stage and precision; how many finished, and were compared."""
    stage, precision = layout
    draw = random.Random(f"{seed} {layout}")
    data = folder / "data"
    data.mkdir()
    for file in SAMPLE.glob("train-*.jsonl"):
        shutil.copy2(file, data)
    runs = Runs(
        folder,
        *STAGES[stage],
        data / "train-*.jsonl",
        TOKENIZER,
        mixed_precision=PRECISIONS[precision],
        validation_sources=[{"path": str(SAMPLE / "validation.jsonl")}],
        eval_documents=4,
        verify_sources="hash",
    )
    expected = result(runs.reference)
    batches = [faults[i : i + FAULTS_OF_A_RUN] for i in range(0, len(faults), FAULTS_OF_A_RUN)]
    for number, batch in enumerate(batches):
        output_dir = folder / f"run-{number}"
        for name in batch:
            row, fault = rows[name], FAULTS[name][1]
            found = fault(Run(runs, output_dir, draw))
            row.tries += 1
            row.moments[found.moment] += 1
            row.outcomes[found.outcome] += 1
            row.problems += [f"{layout}: {found.problem}"] if found.problem else []
            progress(f"{stage} {precision}: {name} {found.moment}: {found.outcome}{found.problem}")
        runs.finish(output_dir)
        made = Counter(record["step"] for record in steps(output_dir))
        lost, twice = STEPS - len(made), made.total() - len(made)
        is_same = result(output_dir) == expected
        for row in {name: rows[name] for name in batch}.values():
            row.lost, row.twice = row.lost + lost, row.twice + twice
            row.problems += [] if is_same else [f"{layout}: other metrics or weights"]
        progress(f"{stage} {precision}: finished, {'bit-identical' if is_same else 'ANOTHER RUN'}")
    return len(batches)


def main() -> None:
    args = parse(Arguments)
    layouts = list(itertools.product(STAGES, PRECISIONS))
    names = random.Random(args.seed).choices(
        [*FAULTS], [share for share, _ in FAULTS.values()], k=args.tries
    )
    rows = {name: Row(name) for name in FAULTS}
    packages = ("torch", "transformers", "accelerate", "deepspeed")
    facts, start = describe("python tests/soak.py", packages), time.monotonic()

    def progress(text: str) -> None:
        done, passed = sum(row.tries for row in rows.values()), time.monotonic() - start
        left = timedelta(seconds=round(passed / max(done, 1) * (args.tries - done)))
        print(f"{done}/{args.tries} tries  {left} left  {text}", flush=True)

    finished = 0
    for index, layout in enumerate(layouts):
        with TemporaryDirectory() as folder:
            faults = names[index :: len(layouts)]
            finished += soak(layout, faults, rows, args.seed, Path(folder), progress)
    facts["runs"] = f"{finished} finished and compared; {', '.join(STAGES)}; fp32 and bf16"
    facts["time"] = str(timedelta(seconds=round(time.monotonic() - start)))
    write_results(
        args.results, as_table(rows.values()), facts, {"rows": [vars(row) for row in rows.values()]}
    )
    if problems := [problem for row in rows.values() for problem in row.problems]:
        raise InputError(f"{len(problems)} of {args.tries} tries went wrong: {problems[0]}")


def as_table(rows: Iterable[Row]) -> str:
    heads = ["fault", "tries", "what it met", "outcome", "steps lost", "steps twice", "silent"]
    return markdown_table(heads, (row.cells for row in rows))


if __name__ == "__main__":
    command(main)
