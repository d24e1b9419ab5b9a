"""Which evaluation of a run was the best, and whether the run should end for want of a better."""

import math
from typing import Any

from utils.config import InputError
from utils.training_arguments import TrainingArguments


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
