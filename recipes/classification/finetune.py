"""Fine-tune a model to classify texts: one label, several labels, or a number (regression).

Encoders and decoders; single texts and pairs; all weights, a part of them, or LoRA:

    python recipes/classification/finetune.py recipes/classification/configs/finetune_smoke.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml \\
        recipes/classification/finetune.py recipes/classification/configs/finetune_demo.yaml
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 8 \\
        recipes/classification/finetune.py recipes/classification/configs/finetune_mnli.yaml
    sbatch accelerate_configs/slurm_multi_node.sh \\
        recipes/classification/finetune.py recipes/classification/configs/finetune_mnli.yaml

The same command continues a run that was stopped. Besides what every run writes there are
predictions.jsonl, of the test data in their order, and plots of the errors and the calibration.
"""

import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import numpy as np
import torch
import transformers
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from adversarial import Adversarial, Adversary, symmetric_divergence
from augmentation import Augmentation, Augmenter
from classification_examples import (
    Example,
    TrainingExamples,
    check_tokenizer,
    collate,
    configure,
    labelled_examples,
)
from classification_metrics import ERRORS, METRICS, measure, probabilities, undefined_metrics
from given_labels import given_labels, keep_labels
from labelled_texts import LabelledTextArguments, class_weights, label_ids, read_labelled_texts
from utils.adapters import AdapterArguments, task_model, trainable_share
from utils.arguments import FinetuningArguments
from utils.config import InputError, at_end, command, parse
from utils.epochs import Epochs, digest, hold_out
from utils.model import check_positions, load_tokenizer, model_config
from utils.program import say, spared, warn
from utils.report import conclude
from utils.run_folder import RunFolder
from utils.scoring import check_finite, score_examples, write_predictions
from utils.training import Training

USAGE = """
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

model = AutoModelForSequenceClassification.from_pretrained("{model}"{labels})
tokenizer = AutoTokenizer.from_pretrained("{model}")
classify = pipeline("text-classification", model, tokenizer=tokenizer, truncation=True, top_k=None)
print(classify({text}))
"""
# what is learned from the texts: it must not change over the life of a run
LEARNED = ("class_weights", "label_smoothing", "adversarial", "augmentation", "new_head")


@dataclass
class Arguments(FinetuningArguments, LabelledTextArguments, AdapterArguments):
    """Fine-tune a model to classify texts: one label, several labels, or a number."""

    model: dict[str, Any] = field(default_factory=lambda: {"model_type": "bert"})
    # a classifier that is given keeps its labels and their order, or is refused; true: its head is
    # drawn anew, for the labels of the data
    new_head: bool = False
    merge_adapter: bool = True  # the head of a classifier is no part of any base model
    # of settings of the model's config, for example {classifier_dropout: 0.2}
    dropout: dict[str, float] = field(default_factory=dict)
    # label → weight, or rows / (labels x rows of the label); with several labels of a row it is
    # the weight of a label's presence over its absence (balanced: absent / present rows)
    class_weights: dict[str, float] | Literal["balanced"] | None = None
    label_smoothing: float = 0.0
    adversarial: Adversarial | None = None
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
        if self.adversarial is not None:
            self.adversarial.check(self.mixed_precision)
            if self.torch_compile:
                raise InputError(
                    "torch_compile: what is compiled cannot be perturbed: leave it out"
                )
        if self.augmentation is not None:
            self.augmentation.check(self.problem_type, self.text_pair_column is not None)
        self.check_metric([f"eval_{name}" for name in METRICS[self.problem_type]])

    def fixed(self) -> dict[str, Any]:
        return super().fixed() | {name: asdict(self)[name] for name in LEARNED}

    @property
    def is_greater_better(self) -> bool:
        if self.greater_is_better is None and self.eval_metric.removeprefix("eval_") in ERRORS:
            return False
        return super().is_greater_better


class ClassificationLoss(torch.nn.Module):
    """Σ of the loss of each text's label: cross-entropy, of each label's yes or no, or squared.

    With an adversary the adversarial loss stands beside it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        problem_type: str,
        label_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        adversarial: Adversarial | None = None,
    ):
        super().__init__()
        self.model, self.problem_type, self.label_smoothing = model, problem_type, label_smoothing
        self.label_weights = None if label_weights is None else torch.tensor(label_weights)
        is_plain = adversarial is None or adversarial.coefficient == 0
        self.adversary = None if is_plain else Adversary(model, adversarial)
        self.names = ("loss",) if is_plain else ("label_loss", "adversarial_loss")

    def forward(
        self,
        labels: torch.Tensor,
        weights: torch.Tensor,
        noise_keys: torch.Tensor,
        predict: bool = False,
        **inputs: torch.Tensor,
    ) -> Any:
        """
        Args:
            labels, weights, noise_keys: (rows,), labels also (rows, labels).
            inputs: input_ids and attention_mask, of some models token_type_ids: (rows, tokens).

        Returns:
            {name: the sum of its losses}, or if `predict` the logits, (rows, labels).
        """

        def logits() -> torch.Tensor:
            return self.model(**inputs).logits.float()

        if predict:
            return logits()
        if self.adversary is None or not self.training:
            return {self.names[0]: (weights * self.label_losses(logits(), labels)).sum()}
        label, adversarial = self.adversary.losses(
            logits,
            partial(self.label_losses, labels=labels),
            partial(symmetric_divergence, self.problem_type),
            inputs["attention_mask"],
            noise_keys,
        )
        # how smooth the model is has nothing to do with labels and their weights
        is_smart = self.adversary.settings.method == "smart"
        of_adversary = (weights > 0).float() if is_smart else weights
        sums = (weights * label).sum(), (of_adversary * adversarial).sum()
        return dict(zip(self.names, sums, strict=True))

    def label_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(rows, labels) → (rows,)"""
        weights = self.label_weights
        weights = None if weights is None else weights.to(logits.device)
        smoothing = self.label_smoothing
        if self.problem_type == "regression":
            return mse_loss(logits.squeeze(1), labels, reduction="none")
        if self.problem_type == "single_label_classification":
            return cross_entropy(
                logits, labels, weights, reduction="none", label_smoothing=smoothing
            )
        labels = labels * (1 - smoothing) + smoothing / 2
        return binary_cross_entropy_with_logits(
            logits, labels, reduction="none", pos_weight=weights
        ).mean(1)

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        return dict.fromkeys(self.names, int((batch["weights"] > 0).sum()))


def predict(
    training: Training,
    examples: list[Example],
    to_batch: Callable[[list[list[Example]]], dict[str, torch.Tensor]],
) -> np.ndarray | None:
    """The logits of each example, (examples, labels), on all ranks; None when a signal interrupts.

    Args:
        to_batch: rows of one example or none → the batch.
    """

    def logits(indices: list[int]) -> np.ndarray:
        batch = to_batch([[examples[index]] for index in indices] or [[]])
        return training.forward(batch, predict=True).float().cpu().numpy()

    found = score_examples(training, examples, logits, "predicting")
    return None if found is None else np.stack(found)


def evaluate(training: Training, logits: np.ndarray | None, labels: np.ndarray) -> dict | None:
    """The metrics of these logits, on all ranks; of no logits None."""
    if logits is None:
        return None
    check_finite(logits)
    problem, found = training.arguments.problem_type, []
    with training.ranks.together():
        if training.is_main:
            found = [measure(problem, logits, labels)]
    return training.ranks.gather(found)[0]


def check_labels(labels: dict[str, np.ndarray], args: Arguments) -> None:
    """Raises InputError where metric_for_best_model is not defined on the validation data."""
    for split in ("validation", "test"):
        found = undefined_metrics(args.problem_type, labels[split]) if len(labels[split]) else []
        if not found:
            continue
        problem = f"all rows of the {split} data have the same {args.label_column}"
        if split == "validation" and args.eval_metric.removeprefix("eval_") in found:
            raise InputError(f"metric_for_best_model: {args.eval_metric} is not defined: {problem}")
        warn(f"{problem}: {', '.join(found)} is not defined there, null in the results")


@at_end
def main() -> None:
    args = parse(Arguments)
    tables = {"train": args.train_data, "validation": args.validation_data, "test": args.test_data}
    rows = read_labelled_texts(tables, args)
    tokenizer = load_tokenizer(args)
    config = model_config(args, tokenizer)
    # the names also of rows that are held out of the training rows
    rows, names = keep_labels(rows, given_labels(config, args), args)
    parts, leaks = hold_out([*rows.values()], attrgetter("texts"), args)
    rows = dict(zip(tables, parts, strict=True))
    labels = {split: label_ids(found, names, args) for split, found in rows.items()}
    check_labels(labels, args)
    weights = class_weights(names, labels["train"], args)
    check_tokenizer(tokenizer, config, args.sequence_length)
    configure(config, names, args.problem_type, args.dropout)
    examples, cut = {}, {}
    for split in tables:
        examples[split], cut[split] = labelled_examples(tokenizer, rows[split], labels[split])
    args = args.for_examples(len(examples["train"]))
    fingerprint = {
        "the training data": digest((row.texts, row.label) for row in rows["train"]),
        "the tokenizer": digest(example["input_ids"].tobytes() for example in examples["train"]),
    }
    folder = RunFolder(args.output_dir, args.resume)
    if folder.is_finished(args, fingerprint["the training data"]):
        return

    training = Training(args, folder)
    model, trained = task_model(
        args, config, transformers.AutoModelForSequenceClassification, "SEQ_CLS", folder.path
    )
    check_positions(model, args.sequence_length)
    objective = ClassificationLoss(
        model, args.problem_type, weights, args.label_smoothing, args.adversarial
    )
    augmenter = (
        Augmenter(rows["train"], args.augmentation, args.seed) if args.augmentation else None
    )
    step_weights = None if args.is_multi_label else weights
    make = TrainingExamples(examples["train"], tokenizer, step_weights, augmenter, args.seed)
    to_batch = partial(collate, pad_token_id=tokenizer.pad_token_id, label=labels["train"][0])
    facts = {
        "labels": ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else ""),
        "examples": ", ".join(f"{len(found):,} {split}" for split, found in rows.items()),
        "cut to sequence_length": ", ".join(f"{n:,} {split}" for split, n in cut.items()),
        **leaks,
        "trained": trainable_share(trained),
    }
    training.prepare(
        objective,
        trained,
        tokenizer,
        Epochs(examples["train"], to_batch, fingerprint, args, vary=make),
    )
    say("\n".join(f"{name}: {value}" for name, value in facts.items()))
    for _ in training.steps():
        if training.evaluates():
            results: dict[str, Any] | None = {}
            if examples["validation"]:
                logits = predict(training, examples["validation"], to_batch)
                results = evaluate(training, logits, labels["validation"])
            training.record_evaluation(results)
    if training.stopped:
        return

    training.load_best()
    split = "test" if examples["test"] else "validation"
    if examples[split]:
        logits = predict(training, examples[split], to_batch)
        results = evaluate(training, logits, labels[split])
        if results is None:
            return training.stop()
        if split == "test":
            training.record_test(results)
        facts |= {
            f"{name.removeprefix('eval_').replace('_', ' ')} of the {split} data": (
                "not defined: all are the same" if value is None else f"{value:.4f}"
            )
            for name, value in results.items()
        }
        with training.ranks.together():
            if training.is_main:
                from classification_report import prediction_records, write_figures

                found = probabilities(args.problem_type, logits.astype(np.float64))
                facts["predictions"] = folder.path / "predictions.jsonl"
                records = prediction_records(names, found, labels[split])
                write_predictions(facts["predictions"], records)
                with spared("no plots of the predictions", but=OSError):
                    for path in write_figures(folder.path, names, found, labels[split]):
                        facts[f"plot of the {path.stem.replace('_', ' ')}"] = path
    is_pair = args.text_pair_column is not None
    text = '{"text": "The first text.", "text_pair": "The second."}' if is_pair else '"A text."'
    # an adapter alone takes them from its base model
    known = f", id2label={model.config.id2label}, problem_type={args.problem_type!r}"
    is_adapter = args.has_adapter and not args.merge_adapter
    usage = USAGE.replace("{text}", text).replace("{labels}", known if is_adapter else "")
    conclude(training, "Text classifier", "text-classification", usage, facts)


if __name__ == "__main__":
    command(main)
