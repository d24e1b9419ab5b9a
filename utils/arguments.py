"""Settings that training scripts share; named as in transformers.TrainingArguments."""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_type_hints

from utils.config import InputError
from utils.optimizer import OptimizerArguments, SchedulerType
from utils.ranks import check_launch, launched_world_size
from utils.tables import Table, check_held_out_tables, check_weights

# as Accelerate calls them, each like its package
TRACKERS = "aim, clearml, comet_ml, dvclive, mlflow, swanlab, tensorboard, trackio, wandb"
LESS_IS_BETTER = ("loss", "error", "bits_per_byte")  # how such a metric's name ends


def is_installed(name: str) -> bool:
    found = find_spec(name)
    return found is not None and found.origin is not None  # a mere folder wandb/ is no package


@dataclass
class TrainingArguments(OptimizerArguments):
    """How it is trained; named as in transformers.TrainingArguments."""

    output_dir: str = "runs/run"  # everything the run writes; started again, it continues
    resume: Literal["auto", "never"] = "auto"  # "never" refuses an output_dir with checkpoints
    warm_start: str | None = None  # a checkpoint whose weights and optimizer a new run begins with
    seed: int = 0
    sequence_length: int = 1024  # tokens of a row
    global_batch_size: int = 64  # sequences a step, over all processes
    per_device_batch_size: int = 8  # sequences a micro-batch; accumulation makes up the rest
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    # required, or max_tokens or num_train_epochs, unless the learning rate is constant: the run
    # ends at the first of max_steps, max_tokens, max_hours
    max_steps: int | None = None
    max_tokens: int | None = None
    # Times that all data are seen. Of a stream without max_steps and max_tokens the steps are
    # counted first, which takes as long as tokenizing it all; `epochs` of a source comes before it
    num_train_epochs: float | None = None
    max_hours: float | None = None  # of training, over all interruptions
    max_skipped_steps: int = 5  # non-finite steps in a row after which the run stops
    # standard deviations above the mean of the last 100 losses: such a step is reported
    loss_spike_threshold: float = 6.0
    skip_loss_spikes: bool = False  # and leaves the weights as they are
    # that training files are those of the checkpoint: by size and time, or (reads them all) xxh3
    verify_sources: Literal["size", "hash"] = "size"
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    logging_steps: int = 1
    eval_steps: int | None = None  # null: only at the end
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool | None = None  # null: unless it is a loss, an error, bits per byte
    load_best_model_at_end: bool = False  # that checkpoint is kept, tested and exported
    early_stopping_patience: int | None = None  # evaluations without a better one
    save_steps: int = 1000  # and before each evaluation: what it may raise loses no step
    keep_last: int = 2  # checkpoints
    keep_every: int | None = None  # and those whose step this divides
    # trackers by name, all that are installed, or none; TensorBoard where it is installed
    report_to: list[str] | str = field(
        default_factory=lambda: ["tensorboard"] if is_installed("tensorboard") else "none"
    )
    project: str = "huggingface"  # of trackers but TensorBoard, which shows folders
    run_name: str | None = None  # to the same trackers; null: output_dir
    push_to_hub: bool = False  # upload model/, with card and plots, at the end of the run
    hub_model_id: str | None = None  # user/name, or a name of one's own; null: that of output_dir
    hub_private_repo: bool | None = None  # where it is made; null: as its owner has it by default
    license: str | None = None  # of the card, as the Hub spells it: apache-2.0, llama3.1, other
    language: list[str] | str = field(default_factory=list)  # of the card: en, or [en, de, code]
    tags: list[str] = field(default_factory=list)  # of the card

    def check(self) -> None:
        for name, hint in get_type_hints(TrainingArguments).items():
            value = getattr(self, name)
            # but for these two, 0 of nothing makes sense
            is_count = hint in (int, int | None) and name not in ("seed", "warmup_steps")
            if is_count and value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if self.num_train_epochs is not None and not 0 < self.num_train_epochs < math.inf:
            raise InputError(f"num_train_epochs must be more than 0, not {self.num_train_epochs}")
        _ = self.trackers
        self._check_card()
        check_launch(self)
        self.check_batch(self.per_device_batch_size)
        super().check()

    def _check_card(self) -> None:
        codes = [self.language] if isinstance(self.language, str) else self.language
        # codes of ISO 639, which datasets brings
        file = Path(find_spec("datasets").origin).parent / "utils/resources/languages.json"
        for code in codes:
            if code not in {"multilingual", *json.loads(file.read_text(encoding="utf-8"))}:
                raise InputError(f"language: {code!r} is no code of ISO 639 such as en, de, yue")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license or "mit"):
            raise InputError(
                f"license: {self.license!r} is not spelt as on the Hub: apache-2.0, llama3.1, other"
            )

    def fixed(self) -> dict[str, Any]:
        own = {"seed": self.seed, "sequence_length": self.row_length}
        return super().fixed() | own | {"global_batch_size": self.global_batch_size}

    def check_batch(self, per_device_batch_size: int) -> None:
        """Raises InputError unless micro-batches of that size make up the global batch."""
        processes = launched_world_size()
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
    def row_length(self) -> int:
        """Tokens of the longest row."""
        return self.sequence_length

    @property
    def total_steps(self) -> int | None:
        """Steps of the run and of its learning-rate schedule, if max_steps or max_tokens says."""
        limits = [self.max_steps] if self.max_steps is not None else []
        if self.max_tokens is not None:
            limits.append(math.ceil(self.max_tokens / (self.global_batch_size * self.row_length)))
        return min(limits, default=None)

    @property
    def has_length(self) -> bool:
        """Whether the settings say how long the run, and its learning-rate schedule, is."""
        return self.total_steps is not None or self.num_train_epochs is not None

    @property
    def trackers(self) -> list[str]:
        """Those that `report_to` means.

        Raises:
            InputError: no tracker of this name, or not installed.
        """
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        if "all" in names:
            return [name for name in TRACKERS.split(", ") if is_installed(name)]
        names = [name for name in dict.fromkeys(names) if name != "none"]
        for name in names:
            if name not in TRACKERS.split(", "):
                raise InputError(
                    f"report_to: no tracker {name!r}: give all, none, or of {TRACKERS}"
                )
            if not is_installed(name):
                raise InputError(
                    f"report_to: {name} is not installed: pip install {name.replace('_', '-')}, "
                    "or leave it out"
                )
        return names

    @property
    def hub_name(self) -> str:
        """Of the repository, without its owner where that is the user."""
        return self.hub_model_id or os.path.basename(os.path.abspath(self.output_dir))

    @property
    def eval_metric(self) -> str:
        """metric_for_best_model as evaluations name it."""
        return f"eval_{self.metric_for_best_model.removeprefix('eval_')}"

    @property
    def is_greater_better(self) -> bool:
        """Of metric_for_best_model."""
        given, name = self.greater_is_better, self.metric_for_best_model
        return not name.endswith(LESS_IS_BETTER) if given is None else given

    def check_metric(self, measured: Iterable[str]) -> None:
        """Raises InputError unless evaluations, which measure these, give metric_for_best_model."""
        if self.eval_metric not in measured:
            raise InputError(
                f"metric_for_best_model: {self.eval_metric} is not measured; these are: "
                + ", ".join(measured)
            )

    @property
    def limits(self) -> dict[str, Any]:
        """What brings a run to its end; raised, a finished run goes on."""
        names = ("max_steps", "max_tokens", "max_hours", "early_stopping_patience")
        return {name: getattr(self, name) for name in names}


@dataclass
class FinetuningArguments(TrainingArguments):
    """What examples are read, and how often."""

    train_data: list[Table] = field(default_factory=list)  # required
    validation_data: list[Table] = field(default_factory=list)
    test_data: list[Table] = field(default_factory=list)  # read once, at the end of the run
    # share of train_data, by the hash of each row, that is validation data where there are none
    validation_split: float | None = None
    # when the texts of held-out rows stand in train_data too: they are counted, or stop the run
    on_leaked_rows: Literal["report", "fail"] = "report"
    num_train_epochs: float = 3.0
    max_steps: int | None = None  # null: those of num_train_epochs
    global_batch_size: int = 32  # examples a step, over all processes
    # A micro-batch holds at most this many examples of sequence_length, or more that are shorter:
    # it has per_device_batch_size x sequence_length tokens at most, padding included.
    per_device_batch_size: int = 8
    sequence_length: int = 512  # tokens of an example, at most
    lr_scheduler_type: SchedulerType = "linear"
    warmup_ratio: float = 0.0  # of the run's steps, where warmup_steps is 0
    weight_decay: float = 0.01  # L2, decoupled: of matrices, not of norms and biases
    adam_beta2: float = 0.999
    eval_steps: int | None = None  # null: at the end of each epoch
    save_steps: int | None = None  # null: at the end of each epoch
    load_best_model_at_end: bool = True
    packing: ClassVar[bool] = False  # several examples a row: a setting of recipes that can

    def check(self) -> None:
        if not 0 <= self.warmup_ratio < 1:
            raise InputError(f"warmup_ratio must be in [0, 1), not {self.warmup_ratio}")
        if self.max_tokens is not None:
            raise InputError("max_tokens: fine-tuning is given its length by epochs or max_steps")
        if not self.train_data:
            raise InputError("train_data: give at least one table: [{path: train.jsonl}]")
        for name in ("validation_data", "test_data"):
            check_held_out_tables(name, getattr(self, name))
        check_weights(self.trained_tables)
        if self.validation_split is not None:
            if self.validation_data:
                raise InputError("validation_split: there is validation_data too: keep one of them")
            if not 0 < self.validation_split < 1:
                raise InputError(f"validation_split must be in (0, 1), not {self.validation_split}")
        if not self.has_validation and self.early_stopping_patience is not None:
            raise InputError("early_stopping_patience: give validation_data to stop by")
        super().check()

    @property
    def adamw_learning_rate(self) -> float:
        is_given = getattr(self, "model_name_or_path", None) or getattr(self, "is_carved", False)
        of_all = 2e-5 if is_given else super().adamw_learning_rate
        return 2e-4 if getattr(self, "has_adapter", False) else of_all

    @property
    def trained_tables(self) -> list[Table]:
        return [*self.train_data, *getattr(self, "transfer_data", ())]

    @property
    def has_validation(self) -> bool:
        return bool(self.validation_data) or self.validation_split is not None

    def check_batch(self, per_device_batch_size: int) -> None:
        """Any micro-batches make up a step: there is nothing that would not divide."""

    @property
    def has_length(self) -> bool:
        return True  # of num_train_epochs, once the examples are counted

    def for_examples(self, count: int) -> Self:
        """With the steps of the run and its cadence, for so many examples an epoch; as checked."""
        epoch = math.ceil(count / self.global_batch_size)
        steps = self.max_steps or math.ceil(self.num_train_epochs * epoch)
        settings = replace(
            self,
            max_steps=steps,
            eval_steps=self.eval_steps or epoch,
            save_steps=self.save_steps or epoch,
            warmup_steps=self.warmup_steps or math.ceil(self.warmup_ratio * steps),
        )
        settings.check()
        return settings
