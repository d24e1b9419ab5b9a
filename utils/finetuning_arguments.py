"""Settings that the fine-tuning recipes share: their data, and their length in epochs."""

import math
from dataclasses import dataclass, field
from typing import Literal

from utils.config import InputError
from utils.engine import launched_with_fsdp, launched_zero_stage
from utils.tables import Table
from utils.training_arguments import SchedulerType, TrainingArguments


@dataclass
class FinetuningArguments(TrainingArguments):
    """Settings that the fine-tuning recipes share."""

    train_data: list[Table] = field(default_factory=list)
    validation_data: list[Table] = field(default_factory=list)
    test_data: list[Table] = field(default_factory=list)  # read once, at the end of the run
    num_train_epochs: float = 3.0  # unless max_steps says how long the run is
    global_batch_size: int = 32  # examples a step, over all processes
    # A micro-batch holds at most this many examples of sequence_length, or more that are shorter:
    # it has per_device_batch_size x sequence_length tokens at most, padding included.
    per_device_batch_size: int = 8
    sequence_length: int = 512  # tokens of an example, at most
    learning_rate: float = 2e-5
    lr_scheduler_type: SchedulerType = "linear"
    warmup_ratio: float = 0.0  # of the run's steps, where warmup_steps is 0
    weight_decay: float = 0.01  # L2, decoupled: of matrices, not of norms and biases
    l1_decay: float = 0.0  # the same with L1: w moves to 0 by learning_rate x l1_decay a step
    # the second keeps Adam's moments in 8 bits, those of embeddings in 32; not under ZeRO or FSDP
    optim: Literal["adamw_torch_fused", "adamw_bnb_8bit"] = "adamw_torch_fused"
    adam_beta2: float = 0.999
    eval_steps: int | None = None  # null: at the end of each epoch
    save_steps: int | None = None  # null: at the end of each epoch
    load_best_model_at_end: bool = True

    def check(self) -> None:
        self.check_counts()
        if self.num_train_epochs <= 0:
            raise InputError(f"num_train_epochs must be more than 0, not {self.num_train_epochs}")
        if not 0 <= self.warmup_ratio < 1:
            raise InputError(f"warmup_ratio must be in [0, 1), not {self.warmup_ratio}")
        if self.l1_decay < 0:
            raise InputError(f"l1_decay must not be negative, not {self.l1_decay}")
        is_split = launched_zero_stage() > 0 or launched_with_fsdp()
        if self.optim == "adamw_bnb_8bit" and is_split:
            raise InputError(
                "optim: adamw_bnb_8bit keeps the moments of whole matrices: launch without ZeRO "
                "and FSDP (single_gpu.yaml, multi_gpu.yaml), or take adamw_torch_fused"
            )
        if self.max_tokens is not None:
            raise InputError("max_tokens: fine-tuning is given its length by epochs or max_steps")
        if not self.train_data:
            raise InputError("train_data: give at least one table: [{path: train.jsonl}]")
        for name in ("validation_data", "test_data"):
            for table in getattr(self, name):
                if table.is_of_the_hub and table.split is None:
                    raise InputError(
                        f"{name}: say which split of {table.path} it is, for example "
                        f"{{path: {table.path}, split: {name.removesuffix('_data')}}}"
                    )
        self.metric_for_best_model = f"eval_{self.metric_for_best_model.removeprefix('eval_')}"
        if not self.validation_data and self.early_stopping_patience is not None:
            raise InputError("early_stopping_patience: give validation_data to stop by")

    def check_batch(self, per_device_batch_size: int) -> None:
        """Any micro-batches make up a step: there is nothing that would not divide."""

    def set_length(self, examples: int) -> None:
        """Once the number of training examples is known: the steps of the run, and its cadence.

        Raises:
            InputError: as `TrainingArguments.check` has it.
        """
        epoch = math.ceil(examples / self.global_batch_size)
        if self.max_steps is None:
            self.max_steps = math.ceil(self.num_train_epochs * epoch)
        self.eval_steps = self.eval_steps or epoch
        self.save_steps = self.save_steps or epoch
        if self.warmup_steps == 0:
            self.warmup_steps = math.ceil(self.warmup_ratio * self.max_steps)
        super().check()
