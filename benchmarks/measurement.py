"""What every measurement is reported with: its conditions, medians and spreads, and two files."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from utils.files import written_aside


def describe(program: str, packages: Sequence[str]) -> dict[str, Any]:
    """Command, hardware, versions, commit and date; asked before the start, for the load.

    Args:
        program: the command without its settings, for example "python -m benchmarks.stream".
        packages: whose versions the numbers depend on.
    """
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(
        git, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "command": shlex.join([*program.split(), *sys.argv[1:]]),
        "hardware": f"{_hardware()}; load before the start: {os.getloadavg()[0]:.1f}",
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "commit": commit.stdout.strip(),
        "date": str(date.today()),
    }


def _hardware() -> str:
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    processor, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = (x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
        processor = next(names, processor)
    has_affinity = hasattr(os, "sched_getaffinity")  # macOS has none
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    return ", ".join([*gpu, processor, f"{cores} cores"])


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Turn by turn: what slows the machine down for a while slows both."""
    return [value / other for value, other in zip(values, reference, strict=True)]


def median_and_range(values: Sequence[float], form: str) -> str:
    """`median (least to most)`, each number as the format specification says."""
    least, most = format(min(values), form), format(max(values), form)
    return f"{statistics.median(values):{form}} ({least} to {most})"


def write_results(results: str, text: str, facts: dict[str, Any], measured: dict[str, Any]) -> None:
    """Print the text; write it with the facts to `results`.md, all the numbers to `results`.json.

    Args:
        results: a path without its ending.
        text: Markdown.
        facts: of `describe`, and settings that the numbers depend on.
    """
    print(f"\n{text}")
    described = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    Path(results).parent.mkdir(parents=True, exist_ok=True)
    content = {
        "md": f"{text}\n\n{described}\n",
        "json": json.dumps({**facts, **measured}, indent=1) + "\n",
    }
    for ending, written in content.items():
        with written_aside(Path(f"{results}.{ending}")) as aside:
            aside.write_text(written)
