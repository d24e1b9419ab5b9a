"""What trials have come to: trials.jsonl, the metric by which they are compared, the best one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.files import remove, written_aside

Evaluations = Sequence[tuple[int, float | None]]  # by step; None: not finite
WEIGHTS = ("checkpoints", "model", "base_model")


class Metric(NamedTuple):
    """Of validation data, as evaluations name it."""

    name: str
    is_greater_better: bool
    is_best_kept: bool  # with load_best_model_at_end a run is as good as its best evaluation

    @property
    def best(self) -> str:
        return "highest" if self.is_greater_better else "lowest"

    def result(self, evaluations: Evaluations) -> float | None:
        """Of the weights that the run has left."""
        finite = [value for _, value in evaluations if value is not None]
        if self.is_best_kept:
            return (max if self.is_greater_better else min)(finite, default=None)
        return evaluations[-1][1] if evaluations else None

    def ranked(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those that have come to their end, the best first."""
        complete = [record for record in records if record["status"] == "complete"]
        return sorted(complete, key=lambda r: r["value"], reverse=self.is_greater_better)


def read_records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "trials.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def write_records(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """All of them, and in the folder of the last one what it has come to."""
    last = records[-1]
    if (folder / last["folder"]).is_dir():  # one may fail before it has a folder
        with written_aside(folder / last["folder"] / "trial.json") as file:
            file.write_text(json.dumps(last, indent=2) + "\n")
    with written_aside(folder / "trials.jsonl") as file:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))


def remove_weights(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    for record in records:
        for name in WEIGHTS:
            remove(folder / record["folder"] / name)
