"""How long causal_lm/pretrain.py takes to say something: --help, a wrong key, the first step.

    python -m benchmarks.startup

CPU seconds, user and system, of all processes of a start, on one thread. `--baseline` is a checkout
of another commit, with data/ in it; both take turns. Results: benchmarks/results/startup.md and
.json.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from benchmarks.measurement import describe, median_and_range, ratios, write_results
from utils.config import InputError, command, parse
from utils.report import markdown_table

# where the script and its smoke config are, and where older commits have them
PLACES = (
    ("recipes/causal_lm/pretrain.py", "recipes/causal_lm/configs/pretrain_smoke.yaml"),
    ("recipes/pretrain/causal_lm.py", "recipes/pretrain/configs/causal_lm_smoke.yaml"),
)
# what is started: the words after the script and its config, what it has printed at the end, status
STARTS = {
    "--help": (["--help"], "max_steps", 0),
    "a wrong key": (["--max_step", "3"], "error: ", 2),
    "the first step": ([], "step 1/", None),
}
GOALS = {"a wrong key": "2.5 s", "the first step": "67% of 200173c's"}
HERE, BASELINE = "this commit", "baseline"


@dataclass
class Arguments:
    """Measure the CPU seconds of a start, beside those of another commit."""

    baseline: str | None = None  # a checkout of the other commit, with data/ in it
    turns: int = 5
    results: str = "benchmarks/results/startup"

    def check(self) -> None:
        if self.baseline and not any(Path(self.baseline, path).exists() for path, _ in PLACES):
            raise InputError(f"baseline: {self.baseline} is not a checkout of this repository")


def start(folder: Path, name: str) -> float:
    """CPU seconds until the text is printed and, where a status is expected, the process ends."""
    words, text, status = STARTS[name]
    script, config = next(paths for paths in PLACES if (folder / paths[0]).exists())
    environment = os.environ | {"PYTHONPATH": str(folder.absolute()), "OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as output_dir:
        process = subprocess.Popen(
            [sys.executable, script, config, "--output_dir", f"{output_dir}/run", *words],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = []
        for line in process.stdout:
            lines.append(line)
            if status is None and text in line:
                found = [psutil.Process(process.pid)]
                found += found[0].children(recursive=True)  # workers that read the data
                seconds = sum(sum(each.cpu_times()[:4]) for each in found)
                for each in found:
                    each.kill()
                process.wait()
                return seconds
        # not `process.wait`: this one tells what the process took
        _, ended, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(ended)
    if process.returncode != status or text not in "".join(lines):
        raise InputError(f"{name} in {folder} did not do what it does: {''.join(lines)[-500:]}")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    args = parse(Arguments)
    packages = ("torch", "transformers", "accelerate", "peft", "deepspeed")
    facts = describe("python -m benchmarks.startup", packages)
    folders = {HERE: Path(__file__).parent.parent}
    if args.baseline:
        folders[BASELINE] = Path(args.baseline)
        git = ["git", "-C", args.baseline, "describe", "--always", "--dirty"]
        facts["baseline"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    seconds = {name: {place: [] for place in folders} for name in STARTS}
    for turn in range(args.turns):
        for name, found in seconds.items():
            for place, folder in folders.items():
                found[place].append(start(folder, name))
                print(f"turn {turn + 1}: {name}, {place}: {found[place][-1]:.2f} s", flush=True)
    shares = ["of the baseline"] if args.baseline else []
    header, rows = ["CPU seconds to", *folders, *shares, "goal"], []
    for name, found in seconds.items():
        cells = [median_and_range(values, ".2f") for values in found.values()]
        if args.baseline:
            cells.append(median_and_range(ratios(found[HERE], found[BASELINE]), ".0%"))
        rows.append([name, *cells, GOALS.get(name, "")])
    text = markdown_table(header, rows, "l" + "r" * (len(header) - 1))
    text += f"\n\nMedians (least to most) of {args.turns} turns; shares are of one turn."
    write_results(args.results, text, facts, {"seconds": seconds})


if __name__ == "__main__":
    command(main)
