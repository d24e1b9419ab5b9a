"""What a run remembers from step to step: its counters, losses out of the ordinary, the best model.

A checkpoint keeps all of it.
"""

import math
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.arguments import TrainingArguments
from utils.config import InputError

WINDOW = 100  # of losses that a new one is compared with
ENOUGH = 20  # of them, before any is called a spike


@dataclass
class RunState:
    """Where a run stands, and what it has seen."""

    step: int = 0
    total_steps: int | None = None  # where they were counted: of num_train_epochs
    tokens: int = 0
    seconds: float = 0.0  # of training, over all interruptions
    pending_evaluation: bool = False  # the step is trained, and the caller not yet heard
    evaluated_step: int | None = None
    counted_step: int | None = None  # at which tokens by source were logged
    metrics_size: int = 0  # bytes of metrics.jsonl by then
    ending: str = ""  # why the run has come to its end
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0

    def spike_limit(self, arguments: TrainingArguments) -> float:
        """The loss above which the next step is a spike."""
        usual = self.recent_losses
        if len(usual) < ENOUGH:
            return math.inf
        deviation = statistics.pstdev(usual)
        return statistics.fmean(usual) + arguments.loss_spike_threshold * deviation

    def note_step(
        self, record: dict[str, Any], limit: float, applied: bool, arguments: TrainingArguments
    ) -> str:
        """Count a step, and mark in its record what was wrong with it; says so, or "".

        Args:
            limit: `spike_limit` before the step.
            applied: whether the step changed the weights.
        """
        step, loss, messages = record["step"], record["loss"], []
        if limit < loss < math.inf:
            record["loss_spike"] = True
            messages.append(f"step {step}: the loss of {loss:.4f} is a spike (above {limit:.4f})")
        if applied:
            self.skipped_in_a_row = 0
            self.recent_losses = [*self.recent_losses, loss][-WINDOW:]
        else:
            record["skipped"] = True
            self.skipped_steps += 1
            searches_scale = arguments.mixed_precision == "fp16" and math.isfinite(loss)
            self.skipped_in_a_row += not searches_scale
            norm = record["grad_norm"]
            messages.append(f"step {step}: skipped, loss {loss}, gradient norm {norm}")
        return "\n".join(messages)

    def check_skips(self, arguments: TrainingArguments, last_good: Path | None) -> None:
        """Raises InputError when too many steps in a row were skipped."""
        if self.skipped_in_a_row >= arguments.max_skipped_steps:
            raise InputError(
                f"{self.skipped_in_a_row} steps in a row, up to step {self.step}, were skipped: "
                "loss or gradient not finite, or a spike. Look at the data or the learning_rate; "
                f"the last good checkpoint: {last_good or 'none'}"
            )

    def note_evaluation(self, results: dict[str, Any], arguments: TrainingArguments) -> None:
        """Compare an evaluation with the best one; the run ends when none was better for long."""
        name = arguments.eval_metric
        value, sign = results[name], 1 if arguments.is_greater_better else -1
        best = -math.inf if self.best_metric is None else sign * self.best_metric
        if value is not None and sign * value > best:  # null: not defined, of this evaluation
            self.best_metric, self.best_step = value, self.step
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1
        patience = arguments.early_stopping_patience
        if patience is not None and self.evaluations_since_best >= patience:
            self.ending = f"{name} has not improved {patience} times"


def totals(states: list[dict]) -> dict[str, dict[str, float]]:
    """Of all lanes' states: tokens by source, and what else a recipe has its lanes count.

    `epoch_by_source` is how often the documents were read: the mean over the lanes.
    """
    names = {"tokens_by_source": "seen", "sequence_counts": "counts", "epoch_by_source": "epochs"}
    found = {name: Counter() for name in names}
    for state in states:
        for name, key in names.items():
            found[name].update(state.get(key, {}))
    epochs = found["epoch_by_source"]
    found["epoch_by_source"] = {name: round(n / len(states), 3) for name, n in epochs.items()}
    return {name: dict(sorted(total.items())) for name, total in found.items() if total}


def repeated(found: dict[str, dict[str, float]], arguments: TrainingArguments) -> str:
    """Of `totals`: what has been read more than once though no epochs were asked for."""
    epochs = found.get("epoch_by_source", {}).items()
    times = ", ".join(f"{name} {epoch:.1f} times" for name, epoch in epochs if epoch >= 1)
    is_asked = arguments.num_train_epochs is not None
    return f"the data repeat: by now they were read, {times}" if times and not is_asked else ""
