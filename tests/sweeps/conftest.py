"""What the sweeps find goes into tests/sweeps/results.json and docs/architectures.md.

In `make sweep` each test adds cells for its types; in `make test` the committed ones are read.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
# kind: heading, and the columns in their order
KINDS = {
    "causal": ("Causal language models", ["packed", "unpacked", "further losses"]),
    "masked": ("Masked language models", []),
    "seq2seq": ("Encoder-decoders", []),
    "classification": ("Classifiers", []),
}
INTRODUCTION = """# Architectures

Written by `make sweep`, which goes over every architecture of transformers that it maps to a kind
of model, tiny and with random weights. What is here "same" is compared with transformers' own
model on the same documents; what is not the same is refused by name, before anything is trained.
Further losses are those that a config can ask for (output_router_logits).
"""


def read_results() -> dict[str, dict[str, dict[str, str]]]:
    """kind → type → column → what was found there."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


@pytest.fixture(scope="session")
def results() -> dict[str, dict[str, dict[str, str]]]:
    return read_results()


@pytest.fixture(scope="session")
def record() -> Iterator[Callable[..., None]]:
    """record(kind, model_type, column=what was found, …); written in `make sweep` alone."""
    found: dict[str, dict[str, dict[str, str]]] = {}

    def add(kind: str, model_type: str, **cells: str) -> None:
        found.setdefault(kind, {}).setdefault(model_type, {}).update(cells)

    yield add
    if "SWEEP" in os.environ and found:
        write(found)


def write(found: dict[str, dict[str, dict[str, str]]]) -> None:
    """Merge what was found into the results, and write the page from all of them."""
    results = read_results()
    for kind, types in found.items():
        for model_type, cells in types.items():
            results.setdefault(kind, {}).setdefault(model_type, {}).update(cells)
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    lines = [INTRODUCTION]
    for kind, (heading, columns) in KINDS.items():
        if kind not in results:
            continue
        lines += [f"## {heading}", "", *summary(results[kind], columns), ""]
        lines += ["| type | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for model_type, cells in sorted(results[kind].items()):
            row = [cells.get(column, "").replace("|", "\\|") for column in columns]
            lines.append(f"| {model_type} | " + " | ".join(row) + " |")
        lines.append("")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines))


def summary(types: dict[str, dict[str, str]], columns: list[str]) -> list[str]:
    """A line a column: how many types are the same there."""
    same = {c: sum(cells.get(c) == "same" for cells in types.values()) for c in columns}
    return [
        f"- {column}: {n} of {len(types)} types are the same" for column, n in same.items() if n
    ]
