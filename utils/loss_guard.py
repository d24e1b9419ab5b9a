"""What a run does about losses out of the ordinary: report them, skip them, stop after many."""

import math
import statistics
from typing import Any

from utils.training_arguments import TrainingArguments

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
