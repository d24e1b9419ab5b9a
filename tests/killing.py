"""Runs that are killed at chosen moments, and what they must come to all the same."""

import random
import textwrap
import time
from pathlib import Path

from launching import CAUSAL_LM, Launch, checkpoints, metrics, run, start_server, tiny_run

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


def reach(launch: Launch, output_dir: Path, moment: str, draw: random.Random, usual: float) -> bool:
    """Wait for a moment of a run; whether it has not come to its end before.

    Args:
        moment: "before the first checkpoint", "in a save", "at the end" (of the run, whose last
            checkpoint is complete, and whose export is not) or "at any time".
        usual: seconds from start to end of an undisturbed run.
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
    return launch.is_alive()


def met(output_dir: Path) -> str:
    """Where a run stands: "in a save", "before the first checkpoint" or "later"."""
    if partial_checkpoints(output_dir):
        return "in a save"
    return "later" if checkpoints(output_dir) else "before the first checkpoint"


def kill(launch: Launch, output_dir: Path, moment: str, draw: random.Random, usual: float) -> str:
    """Send SIGKILL to all ranks at a moment (see `reach`); what it met, "" when all had ended."""
    is_alive = reach(launch, output_dir, moment, draw, usual)
    launch.kill()
    return met(output_dir) if is_alive else ""


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

    def start(
        self, output_dir: Path, script: str = CAUSAL_LM, log: Path | None = None, **settings
    ) -> Launch:
        arguments = tiny_run(output_dir, *self.data, **{**self.settings, **settings})
        return Launch(self.config, self.processes, arguments, log or self.log, script)

    def finish(self, output_dir: Path) -> str:
        arguments = tiny_run(output_dir, *self.data, **self.settings)
        return run(self.config, self.processes, arguments, self.log)


def script_with(path: Path, function: str, code: str, recipe: str = CAUSAL_LM) -> str:
    """A script that runs a recipe with a function of utils replaced.

    Args:
        code: the body of the new function, with `original`, `arguments`, `options`, `rank` and
            `call`, which counts from 1.
    """
    module, _, name = function.rpartition(".")
    path.write_text(f"""
import itertools, os, runpy, signal, time
import psutil
import {module} as module
original, calls, rank = module.{name}, itertools.count(1), int(os.environ.get("RANK", 0))
def replacement(*arguments, **options):
    call = next(calls)
{textwrap.indent(code, "    ")}
module.{name} = replacement
runpy.run_path("{recipe}", run_name="__main__")
""")
    return str(path)
