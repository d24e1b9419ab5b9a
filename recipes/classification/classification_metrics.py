"""How good the logits of a classifier or a regression are, by the metrics beside this file."""

from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from datasets.utils.logging import disable_progress_bar
from scipy.special import expit, log_expit, log_softmax, softmax

CLASSIFICATION = (
    "accuracy",
    "precision_micro",
    "recall_micro",
    "f1_micro",
    "precision_macro",
    "recall_macro",
    "f1_macro",
    "matthews_correlation",
    "roc_auc",
    "expected_calibration_error",
)
# what is measured, by transformers' name of the problem
METRICS = {
    "single_label_classification": ("loss", *CLASSIFICATION),
    "multi_label_classification": ("loss", *CLASSIFICATION),
    "regression": ("loss", "pearsonr", "spearmanr", "mean_absolute_error"),
}
ERRORS = ("expected_calibration_error", "mean_absolute_error")  # the less the better


def probabilities(problem_type: str, logits: np.ndarray) -> np.ndarray:
    """Of each label (rows, labels); of a regression the numbers that are predicted (rows,)."""
    if problem_type == "regression":
        return logits[:, 0]
    return softmax(logits, axis=1) if problem_type.startswith("single") else expit(logits)


def mean_loss(problem_type: str, logits: np.ndarray, labels: np.ndarray) -> float:
    """Without class weights, label smoothing or adversaries: the same number for all of them."""
    if problem_type == "regression":
        return float(np.square(logits[:, 0] - labels).mean())
    if problem_type.startswith("single"):
        return float(-np.take_along_axis(log_softmax(logits, axis=1), labels[:, None], 1).mean())
    return float(-(labels * log_expit(logits) + (1 - labels) * log_expit(-logits)).mean())


def measure(problem_type: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """eval_loss, eval_accuracy and so on: `METRICS` tells which.

    Args:
        logits: (rows, labels).
        labels: (rows,) numbers, of a multi-label problem (rows, labels) zeros and ones.
    """
    logits = logits.astype(np.float64)
    disable_progress_bar()
    file = Path(__file__).parent / "metrics" / f"{problem_type}.py"
    scores = evaluate.load(str(file), keep_in_memory=True).compute(
        predictions=probabilities(problem_type, logits), references=labels
    )
    scores = {"loss": mean_loss(problem_type, logits, labels), **scores}
    return {f"eval_{name}": value for name, value in scores.items()}
