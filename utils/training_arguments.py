"""Settings of the training shell; named as in transformers.TrainingArguments."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import get_scheduler

from utils.config import InputError

COUNTS = (
    "sequence_length",
    "global_batch_size",
    "per_device_batch_size",
    "max_steps",
    "max_tokens",
    "max_skipped_steps",
    "logging_steps",
    "eval_steps",
    "early_stopping_patience",
    "save_steps",
    "keep_last",
    "keep_every",
)

SchedulerType = Literal[
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "constant",
    "constant_with_warmup",
]


@dataclass
class TrainingArguments:
    """Settings of the training shell; named as in transformers.TrainingArguments."""

    output_dir: str = "runs/run"  # everything the run writes; started again, it continues
    resume: Literal["auto", "never"] = "auto"  # "never" refuses an output_dir with checkpoints
    warm_start: str | None = None  # a checkpoint whose weights and optimizer a new run begins with
    seed: int = 0
    sequence_length: int = 1024  # tokens of a row
    global_batch_size: int = 64  # sequences a step, over all processes
    per_device_batch_size: int = 8  # sequences a micro-batch; accumulation makes up the rest
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    learning_rate: float = 3e-4  # the peak
    lr_scheduler_type: SchedulerType = "cosine"
    # as transformers.get_scheduler takes them, for example {min_lr_rate: 0.1}, {num_decay_steps: 9}
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    max_steps: int | None = None  # the run ends at the first of max_steps, max_tokens, max_hours
    max_tokens: int | None = None
    max_hours: float | None = None  # of training, over all interruptions
    weight_decay: float = 0.1  # of matrices and embeddings: not of norms and biases
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    max_skipped_steps: int = 5  # non-finite steps in a row after which the run stops
    # standard deviations above the mean of the last 100 losses: such a step is reported
    loss_spike_threshold: float = 6.0
    skip_loss_spikes: bool = False  # and leaves the weights as they are
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    logging_steps: int = 1
    eval_steps: int | None = None  # null: only at the end
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool | None = None  # null: yes, unless the metric's name ends with "loss"
    load_best_model_at_end: bool = False  # that checkpoint is kept, tested and exported
    early_stopping_patience: int | None = None  # evaluations without a better one
    save_steps: int = 1000
    keep_last: int = 2  # checkpoints
    keep_every: int | None = None  # and those whose step this divides
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])

    def check_counts(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")

    def check(self) -> None:
        self.check_counts()
        self.check_batch(self.per_device_batch_size)
        if self.total_steps is None and not self.lr_scheduler_type.startswith("constant"):
            raise InputError(
                f"lr_scheduler_type: {self.lr_scheduler_type} needs max_steps or max_tokens"
            )
        if self.total_steps is not None and self.warmup_steps > self.total_steps:
            raise InputError(
                f"warmup_steps: {self.warmup_steps} is more than the run's {self.total_steps} steps"
            )

    def check_batch(self, per_device_batch_size: int) -> None:
        """Raises InputError unless micro-batches of that size make up the global batch."""
        processes = int(os.environ.get("WORLD_SIZE", 1))
        if per_device_batch_size < 1 or self.global_batch_size % (
            processes * per_device_batch_size
        ):
            raise InputError(
                f"global_batch_size: {self.global_batch_size} is not divisible by {processes} "
                f"processes x per_device_batch_size {per_device_batch_size}"
            )

    def micro_batch_size(self, step: int) -> int:
        """Sequences a micro-batch of the step after `step` steps."""
        return self.per_device_batch_size

    @property
    def total_steps(self) -> int | None:
        """Steps of the run and of its learning-rate schedule, if max_steps or max_tokens says."""
        limits = [self.max_steps] if self.max_steps is not None else []
        if self.max_tokens is not None:
            limits.append(
                math.ceil(self.max_tokens / (self.global_batch_size * self.sequence_length))
            )
        return min(limits, default=None)

    @property
    def is_greater_better(self) -> bool:
        """Of metric_for_best_model."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not self.metric_for_best_model.endswith("loss")

    def learning_rate_factor(self) -> Callable[[int], float]:
        """What the peak learning rate is multiplied by in the step after `step` steps."""
        try:
            schedule = get_scheduler(
                self.lr_scheduler_type,
                torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate),
                num_warmup_steps=self.warmup_steps,
                num_training_steps=self.total_steps,
                scheduler_specific_kwargs=self.lr_scheduler_kwargs,
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"lr_scheduler_kwargs: {error}") from None
        return schedule.lr_lambdas[0]  # a function of the step: nothing to restore

    @property
    def limits(self) -> dict[str, Any]:
        """What brings a run to its end; raised, a finished run goes on."""
        names = ("max_steps", "max_tokens", "max_hours", "early_stopping_patience")
        return {name: getattr(self, name) for name in names}
