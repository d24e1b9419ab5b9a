"""Does a run grow? Memory, descriptors and threads of its processes, every ten steps.

    python -m benchmarks.steady

Smoke configs on one process, with evaluations, checkpoints of which the oldest go, and a tracker.
The first steps are left out: an evaluation and a save have been by then. Of the rest, the last
third is held against the first. Results: benchmarks/results/steady.md and .json.
"""

import os
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from benchmarks.measurement import describe, write_results
from utils.config import InputError, command, parse
from utils.report import markdown_table

ROOT = Path(__file__).parent.parent
PRETRAIN = ("causal_lm/pretrain.py", "causal_lm/configs/pretrain_smoke.yaml")
BERT = ("bert/pretrain.py", "bert/configs/pretrain_smoke.yaml")
# script and config; data workers, or None where a script knows none
RUNS = [
    (*PRETRAIN, 0),
    (*PRETRAIN, 2),
    (*BERT, 0),
    (*BERT, 2),
    ("causal_lm/finetune.py", "causal_lm/configs/finetune_smoke.yaml", None),
    ("classification/finetune.py", "classification/configs/finetune_smoke.yaml", None),
]
WARMUP, EVERY = 60, 10  # steps
GOAL = 0.02


@dataclass
class Arguments:
    """Sample the memory, the descriptors and the threads of runs."""

    steps: int = 240  # that are measured
    results: str = "benchmarks/results/steady"


def processes_of(pid: int) -> list[psutil.Process]:
    """The rank, and its data workers in the order in which they were started."""
    rank = psutil.Process(pid)
    children = sorted(rank.children(), key=lambda child: child.pid)
    return [rank, *(c for c in children if "resource_tracker" not in " ".join(c.cmdline()))]


def samples(script: str, config: str, workers: int | None, steps: int) -> list[list[list[int]]]:
    """By step and process: resident bytes, descriptors, threads."""
    last = WARMUP + steps
    with TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "max_steps": last, "eval_steps": 30, "save_steps": 20}
        settings |= {"keep_last": 2, "logging_steps": EVERY, "report_to": "tensorboard"}
        if workers is not None:
            settings["dataloader_num_workers"] = workers
        if script.startswith("bert"):
            settings["phases"] = f"[{{sequence_length: 64, steps: {last}}}]"
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        process = subprocess.Popen(
            [sys.executable, f"recipes/{script}", f"recipes/{config}", *words],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        found, lines = [], []
        for line in process.stdout:
            lines.append(line)
            step = re.match(r"step (\d+)/\d+  loss", line)
            if step and WARMUP <= int(step[1]) < last:  # at the last one, workers may be gone
                values = [
                    [each.memory_info().rss, each.num_fds(), each.num_threads()]
                    for each in processes_of(process.pid)
                ]
                found.append(values)
        if process.wait():
            raise InputError(f"{script} has ended with an error: {''.join(lines)[-1000:]}")
    return found


def rows_of(name: str, found: list[list[list[int]]]) -> list[list]:
    """A row a process and quantity: the medians of the first and the last third, the growth."""
    rows, third = [], len(found) // 3
    for process in range(len(found[0])):
        who = "rank" if process == 0 else f"data worker {process}"
        for index, quantity in enumerate(("memory, MB", "descriptors", "threads")):
            values = [sample[process][index] / (1e6 if index == 0 else 1) for sample in found]
            first, last = statistics.median(values[:third]), statistics.median(values[-third:])
            form = ".1f" if index == 0 else ".0f"
            growth = last / first - 1
            rows.append([name, who, quantity, f"{first:{form}}", f"{last:{form}}", f"{growth:.1%}"])
    return rows


def main() -> None:
    args = parse(Arguments)
    facts = describe("python -m benchmarks.steady", ("torch", "transformers", "accelerate"))
    rows, measured = [], {}
    for script, config, workers in RUNS:
        name = script if workers is None else f"{script}, {workers} data workers"
        measured[name] = samples(script, config, workers, args.steps)
        rows += rows_of(name, measured[name])
        print("\n".join(map(str, rows_of(name, measured[name]))), flush=True)
    header = ["run", "process", "", "first third", "last third", "growth"]
    text = markdown_table(header, rows, "lllrrr")
    text += (
        f"\n\nMedians over samples of every {EVERY}th step, of {args.steps} steps after {WARMUP}: "
        f"an evaluation every 30, a checkpoint every 20, the last two kept. Goal: {GOAL:.0%}."
    )
    write_results(args.results, text, facts, {"samples": measured})


if __name__ == "__main__":
    command(main)
