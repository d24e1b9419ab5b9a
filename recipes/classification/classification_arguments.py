"""Settings that fine-tuning a classifier and distilling one share."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from augmentation import Augmentation
from classification_metrics import METRICS
from labelled_texts import LabelledTextArguments
from utils.arguments import FinetuningArguments
from utils.config import InputError
from utils.model import ModelArguments

# what is learned from the texts: it must not change over the life of a run
LEARNED = ("class_weights", "label_smoothing", "augmentation", "new_head")


@dataclass
class ClassificationArguments(FinetuningArguments, LabelledTextArguments, ModelArguments):
    """A model that classifies texts, and what is done with their labels."""

    model: dict[str, Any] = field(default_factory=lambda: {"model_type": "bert"})
    # a classifier that is given keeps its labels and their order, or is refused; true: its head is
    # drawn anew, for the labels of the data
    new_head: bool = False
    # of settings of the model's config, for example {classifier_dropout: 0.2}
    dropout: dict[str, float] = field(default_factory=dict)
    # label → weight, or rows / (labels x rows of the label); with several labels of a row it is
    # the weight of a label's presence over its absence (balanced: absent / present rows)
    class_weights: dict[str, float] | Literal["balanced"] | None = None
    label_smoothing: float = 0.0
    augmentation: Augmentation | None = None  # of the training texts alone

    def check(self) -> None:
        super().check()
        if self.new_head and not self.model_name_or_path:
            raise InputError("new_head: from scratch every head is new: give model_name_or_path")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}")
        if self.problem_type == "regression" and (self.label_smoothing or self.class_weights):
            raise InputError("label_smoothing and class_weights: a regression has no labels")
        given = self.class_weights if isinstance(self.class_weights, dict) else {}
        if min(given.values(), default=1) <= 0:
            raise InputError("class_weights must be more than 0: leave the rows out instead")
        if self.augmentation is not None:
            self.augmentation.check(self.problem_type, self.text_pair_column is not None)
        self.check_metric([f"eval_{name}" for name in METRICS[self.problem_type]])

    def fixed(self) -> dict[str, Any]:
        return super().fixed() | {name: asdict(self)[name] for name in LEARNED}
