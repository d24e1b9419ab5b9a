"""What a classifier says of held-out texts: measured, written, and how it is used afterwards."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from classification_arguments import ClassificationArguments
from classification_examples import Example
from classification_metrics import Outputs, measure, probabilities, undefined_metrics
from labelled_texts import LabelledText
from utils.config import InputError
from utils.program import spared, warn
from utils.scoring import by_domain, check_finite, score_examples, write_predictions
from utils.training import Training

USAGE = """
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

model = AutoModelForSequenceClassification.from_pretrained("{model}"{labels})
tokenizer = AutoTokenizer.from_pretrained("{model}")
classify = pipeline("text-classification", model, tokenizer=tokenizer, truncation=True, top_k=None)
print(classify({text}))
"""


def predict(
    training: Training,
    examples: list[Example],
    to_batch: Callable[[list[list[Example]]], dict[str, torch.Tensor]],
    **flags: Any,
) -> np.ndarray | None:
    """The logits of each example, (examples, labels), on all ranks; None when a signal interrupts.

    Args:
        to_batch: rows of one example or none → the batch.
        flags: of the objective's forward.
    """

    def logits(indices: list[int]) -> np.ndarray:
        batch = to_batch([[examples[index]] for index in indices] or [[]])
        return training.forward(batch, predict=True, **flags).float().cpu().numpy()

    found = score_examples(training, examples, logits, "predicting")
    return None if found is None else np.stack(found)


def evaluate(
    training: Training, logits: np.ndarray | None, labels: np.ndarray, rows: list[LabelledText]
) -> dict | None:
    """The metrics of these logits, in all and by table, on all ranks; of no logits None."""
    if logits is None:
        return None
    check_finite(logits)
    problem, found = training.arguments.problem_type, []
    with training.ranks.together():
        if training.is_main:
            tables = [row.table for row in rows]
            found = [by_domain(tables, lambda of: measure(problem, logits[of], labels[of]))]
    return training.ranks.gather(found)[0]


def check_labels(labels: dict[str, np.ndarray], args: ClassificationArguments) -> None:
    """Raises InputError where metric_for_best_model is not defined on the validation data."""
    for split in ("validation", "test"):
        found = undefined_metrics(args.problem_type, labels[split]) if len(labels[split]) else []
        if not found:
            continue
        problem = f"all rows of the {split} data have the same {args.label_column}"
        if split == "validation" and args.eval_metric.removeprefix("eval_") in found:
            raise InputError(f"metric_for_best_model: {args.eval_metric} is not defined: {problem}")
        warn(f"{problem}: {', '.join(found)} is not defined there, null in the results")


def as_facts(results: dict[str, Any], split: str, whose: str = "") -> dict[str, str]:
    """For the card: "accuracy of the test data" and so on; not by table, of which it has its own.

    Args:
        whose: that is not the trained model: " by the teacher".
    """
    return {
        f"{name.removeprefix('eval_').replace('_', ' ')} of the {split} data{whose}": (
            "not defined: all are the same" if value is None else f"{value:.4f}"
        )
        for name, value in results.items()
        if not isinstance(value, dict)
    }


def kept_share(
    args: ClassificationArguments, results: dict[str, Any], taught: dict[str, Any]
) -> dict[str, str]:
    """For the card, the student's score by that of its teacher: Sanh et al. 2019."""
    usual = "pearsonr" if args.problem_type == "regression" else "accuracy"
    name = args.eval_metric if args.is_greater_better else f"eval_{usual}"
    mine, theirs = results[name], taught[name]
    if mine is None or not theirs or theirs < 0:
        return {}
    return {f"share of the teacher's {name.removeprefix('eval_')} kept": f"{mine / theirs:.1%}"}


def write_predicted(
    training: Training,
    rows: list[LabelledText],
    names: list[str],
    logits: np.ndarray,
    labels: np.ndarray,
) -> dict[str, Any]:
    """predictions.jsonl and plots, in the folder of the run; where they are. All ranks call it."""
    folder, facts = training.folder.path, {}
    with training.ranks.together():
        if training.is_main:
            from classification_report import prediction_records, write_figures

            logits = logits.astype(np.float64)
            found = probabilities(training.arguments.problem_type, logits)
            facts["predictions"] = folder / "predictions.jsonl"
            records = prediction_records(rows, names, Outputs(logits, found, labels))
            write_predictions(facts["predictions"], records)
            with spared("no plots of the predictions", but=OSError):
                for path in write_figures(folder, names, found, labels):
                    facts[f"plot of the {path.stem.replace('_', ' ')}"] = path
    return facts


def usage_of(args: ClassificationArguments, labels: str = "") -> str:
    """Python for the card.

    Args:
        labels: more of `from_pretrained`, where the model does not know them.
    """
    is_pair = args.text_pair_column is not None
    text = '{"text": "The first text.", "text_pair": "The second."}' if is_pair else '"A text."'
    return USAGE.replace("{text}", text).replace("{labels}", labels)
