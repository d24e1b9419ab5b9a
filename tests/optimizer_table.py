"""The table of docs/optimizers.md: of what was measured, and of what the code refuses."""

import re
from pathlib import Path
from typing import get_args, get_type_hints

from utils.optimizer import OptimizerArguments, refusal

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"
OPTIMIZERS = get_args(get_type_hints(OptimizerArguments)["optim"])
LAYOUTS = {
    "one process": None,
    "DDP": "multi_cpu",
    "ZeRO 1": "zero1",
    "ZeRO 2": "zero2",
    "ZeRO 3": "zero3",
    "FSDP2": "fsdp2",
}


def refused(optim: str, layout: str) -> str:
    stage = int(layout[-1]) if layout.startswith("ZeRO") else 0
    return refusal(optim, stage, layout == "FSDP2", 1 if layout == "one process" else 2)


def table(results: dict) -> str:
    """Markdown; `results` as tests/sweeps/test_optimizers.py writes them."""
    lines = ["| `optim` | " + " | ".join(LAYOUTS) + " |", "|---|" + "---|" * len(LAYOUTS)]
    for optim in OPTIMIZERS:
        cells = []
        for layout in LAYOUTS:
            found = results.get(optim, {}).get(layout, {})
            if refused(optim, layout):
                cells.append("refused")
            elif "other" not in found:
                cells.append("exact" if found else "not measured")
            else:
                is_exact = found["other"] < 1e-5
                cells.append(
                    "exact" if is_exact else f"exact; other world size {found['other']:.0e}"
                )
        lines.append(f"| `{optim}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(results: dict) -> None:
    """In the place of the table that the page has."""
    old = re.compile(r"\| `optim` \| one process .*?\n(?=\n)", re.DOTALL)
    PAGE.write_text(old.sub(table(results) + "\n", PAGE.read_text()))
