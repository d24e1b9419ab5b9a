"""What a run remembers from step to step: spikes and skipped steps, the best evaluation."""

import math
import statistics
from typing import Any

from utils.arguments import TrainingArguments
from utils.config import InputError

WINDOW = 100  # of losses that a new one is compared with
ENOUGH = 20  # of them, before any is called a spike


class LossGuard:
    """Spikes and skipped steps of a run; what it remembers is part of a checkpoint."""

    def __init__(self, arguments: TrainingArguments):
        self.arguments = arguments
        self.skipped_steps = self.skipped_in_a_row = 0
        self.recent_losses: list[float] = []

    def state(self) -> dict[str, Any]:
        names = ("skipped_steps", "skipped_in_a_row", "recent_losses")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        for name in self.state():
            setattr(self, name, state[name])

    def forget(self) -> None:
        """What comes is not to be compared with what was."""
        self.recent_losses = []

    def limit(self) -> float:
        """The loss above which the next step is a spike."""
        usual = self.recent_losses
        if len(usual) < ENOUGH:
            return math.inf
        deviation = statistics.pstdev(usual)
        return statistics.fmean(usual) + self.arguments.loss_spike_threshold * deviation

    def note(self, record: dict[str, Any], limit: float, applied: bool) -> str:
        """Count a step, and mark in its record what was wrong with it; says so, or "".

        Args:
            limit: as it was before the step.
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
            searches_scale = self.arguments.mixed_precision == "fp16" and math.isfinite(loss)
            self.skipped_in_a_row += not searches_scale
            norm = record["grad_norm"]
            messages.append(f"step {step}: skipped, loss {loss}, gradient norm {norm}")
        return "\n".join(messages)

    @property
    def is_exhausted(self) -> bool:
        return self.skipped_in_a_row >= self.arguments.max_skipped_steps


class BestModel:
    """By `metric_for_best_model`; what it remembers is part of a checkpoint."""

    def __init__(self, arguments: TrainingArguments):
        self.arguments = arguments
        self.forget()

    def state(self) -> dict[str, Any]:
        names = ("best_metric", "best_step", "evaluations_since_best")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        for name in self.state():
            setattr(self, name, state[name])

    def forget(self) -> None:
        """What comes is not to be compared with what was."""
        self.best_metric: float | None = None
        self.best_step: int | None = None
        self.evaluations_since_best = 0

    def note(self, step: int, results: dict[str, Any]) -> str:
        """Compare an evaluation with the best one; why the run should end, or "".

        Raises:
            InputError: the metric is not among the results.
        """
        a, name = self.arguments, self.arguments.metric_for_best_model
        if name not in results:
            known = ", ".join(k for k, v in results.items() if isinstance(v, float))
            raise InputError(f"metric_for_best_model: {name} is not measured; these are: {known}")
        value, sign = results[name], 1 if a.is_greater_better else -1
        best = -math.inf if self.best_metric is None else sign * self.best_metric
        if sign * value > best:
            self.best_metric, self.best_step = value, step
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1
        patience = a.early_stopping_patience
        if patience is not None and self.evaluations_since_best >= patience:
            return f"{name} has not improved {patience} times"
        return ""

    @property
    def step_to_keep(self) -> int | None:
        """Of the checkpoint that is kept, tested and exported, if there is such a wish."""
        return self.best_step if self.arguments.load_best_model_at_end else None
