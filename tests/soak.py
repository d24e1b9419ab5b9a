"""A hundred kills: what the runs come to must equal undisturbed ones, bit for bit.

    python tests/soak.py [--kills 100] [--seed 0]

After every few kills a run may finish, and is compared. The table is written to
benchmarks/results/soak.md and .json.
"""

import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).parent.parent))  # of benchmarks, which is not installed

from benchmarks.measurement import describe, write_results
from killing import STAGES, Runs, kill, result
from launching import ROOT, checkpoints
from utils.config import InputError, command, parse
from utils.report import markdown_table

SAMPLE = ROOT / "data" / "sample"
TOKENIZER = ROOT / "data" / "tokenizers" / "bpe-8192"
PRECISIONS = {"fp32": "no", "bf16": "bf16"}
MOMENTS = ["in a save", "at any time", "at any time", "at the end", "before the first checkpoint"]
KILLS_OF_A_RUN = 5


@dataclass
class Arguments:
    """Kill runs again and again, let them finish, and compare them with undisturbed ones."""

    kills: int = 100  # over all stages and precisions together
    seed: int = 0  # of the moments
    results: str = "benchmarks/results/soak"


@dataclass
class Row:
    """What was done and found under one stage and precision."""

    stage: str
    precision: str
    kills: Counter = field(default_factory=Counter)  # by what they met
    finished: int = 0  # runs that were killed, finished and compared
    identical: int = 0

    @property
    def cells(self) -> list[str]:
        met = [self.kills[k] for k in ("before the first checkpoint", "in a save", "later")]
        same = "yes" if self.identical == self.finished else "**no**"
        counts = [self.kills.total(), *met, self.finished]
        return [self.stage, self.precision, *map(str, counts), same]


def soak(row: Row, kills: int, seed: int, folder: Path, progress: Callable[[str], None]) -> None:
    """Start, kill and finish runs under one stage and precision until there were `kills`."""
    name = f"{row.stage} {row.precision}"
    draw = random.Random(f"{seed} {name}")
    runs = Runs(
        folder,
        *STAGES[row.stage],
        SAMPLE / "train-*.jsonl",
        TOKENIZER,
        mixed_precision=PRECISIONS[row.precision],
        validation_sources=[{"path": str(SAMPLE / "validation.jsonl")}],
        eval_documents=4,
    )
    expected = result(runs.reference)
    while row.kills.total() < kills:
        output_dir = folder / f"run-{row.finished}"
        for _ in range(min(KILLS_OF_A_RUN, kills - row.kills.total())):
            moments = MOMENTS[:-1] if checkpoints(output_dir) else MOMENTS
            with runs.start(output_dir) as launch:
                met = kill(launch, output_dir, draw.choice(moments), draw, runs.seconds)
            if not met:
                break  # it came to its end before
            row.kills[met] += 1
            progress(f"{name}: kill {row.kills.total()} of {kills}, {met}")
        runs.finish(output_dir)
        row.finished += 1
        row.identical += result(output_dir) == expected
        progress(f"{name}: {row.identical} of {row.finished} finished runs bit-identical")


def main() -> None:
    args = parse(Arguments)
    rows = [Row(stage, precision) for stage in STAGES for precision in PRECISIONS]
    packages = ("torch", "transformers", "accelerate", "deepspeed")
    facts, start = describe("python tests/soak.py", packages), time.monotonic()

    def progress(text: str) -> None:
        done, passed = sum(row.kills.total() for row in rows), time.monotonic() - start
        left = timedelta(seconds=round(passed / max(done, 1) * (args.kills - done)))
        print(f"{done}/{args.kills} kills  {left} left  {text}", flush=True)

    for index, row in enumerate(rows):
        kills = args.kills * (index + 1) // len(rows) - args.kills * index // len(rows)
        with TemporaryDirectory() as folder:
            soak(row, kills, args.seed, Path(folder), progress)
    facts["time"] = str(timedelta(seconds=round(time.monotonic() - start)))
    write_results(args.results, as_table(rows), facts, {"rows": [vars(row) for row in rows]})
    if any(row.identical < row.finished for row in rows):
        raise InputError("a run that was killed differs from an undisturbed one")


def as_table(rows: list[Row]) -> str:
    heads = ["", "precision", "kills", "before the first checkpoint", "in a save", "later"]
    heads += ["runs finished and compared", "bit-identical"]
    return markdown_table(heads, (row.cells for row in rows))


if __name__ == "__main__":
    command(main)
