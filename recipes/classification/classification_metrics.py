"""What is measured of a classifier or a regression: `METRICS` is the list.

scikit-learn and SciPy are imported when something is measured.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BINS = 15


class Outputs(NamedTuple):
    """What a model says of all rows, and what is true."""

    logits: np.ndarray  # (rows, labels)
    probabilities: np.ndarray  # as `probabilities` returns them
    labels: np.ndarray  # (rows,) numbers; of a multi-label problem (rows, labels) zeros and ones

    @property
    def found(self) -> np.ndarray:
        return found_labels(self.probabilities, self.labels)

    @property
    def is_label(self) -> np.ndarray:
        """(rows, labels)"""
        if self.labels.ndim == 2:
            return self.labels
        return self.labels[:, None] == np.arange(self.probabilities.shape[1])

    @property
    def told_apart(self) -> list[int]:
        """The labels that some of the rows have and others have not."""
        counts = self.is_label.sum(0)
        return [label for label, count in enumerate(counts) if 0 < count < len(self.labels)]


def probabilities(problem_type: str, logits: np.ndarray) -> np.ndarray:
    """Of each label (rows, labels); of a regression the numbers that are predicted (rows,)."""
    from scipy.special import expit, softmax

    if problem_type == "regression":
        return logits[:, 0]
    return softmax(logits, axis=1) if problem_type.startswith("single") else expit(logits)


def found_labels(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of the shape of the labels: the likeliest, or all of probability 0.5 and more."""
    if labels.ndim == 1:
        return probabilities.argmax(1)
    return (probabilities >= 0.5).astype(int)


def losses_of(outputs: Outputs) -> np.ndarray:
    """(rows, 1), of several labels (rows, labels): without class weights, label smoothing or
    adversaries, the same for all of them."""
    from scipy.special import log_expit, log_softmax

    logits, labels = outputs.logits, outputs.labels
    if outputs.probabilities.ndim == 1:
        return np.square(outputs.probabilities - labels)[:, None]
    if labels.ndim == 1:
        return -np.take_along_axis(log_softmax(logits, axis=1), labels[:, None], 1)
    return -(labels * log_expit(logits) + (1 - labels) * log_expit(-logits))


def loss(outputs: Outputs) -> float:
    return losses_of(outputs).mean()


def sklearn_score(name: str, **options: Any) -> Callable[[Outputs], float]:
    """scikit-learn's function of this name; with several labels the accuracy is of whole sets."""

    def score(outputs: Outputs) -> float:
        from sklearn import metrics

        return getattr(metrics, name)(outputs.labels, outputs.found, **options)

    return score


def matthews_correlation(outputs: Outputs) -> float:
    """With several labels the mean over those that are told apart."""
    from sklearn.metrics import matthews_corrcoef

    labels, found = outputs.labels, outputs.found
    if labels.ndim == 1:
        return matthews_corrcoef(labels, found)
    values = [matthews_corrcoef(labels[:, x], found[:, x]) for x in outputs.told_apart]
    return np.mean(values) if values else 0.0


def roc_auc(outputs: Outputs) -> float:
    """The mean over the labels that are told apart, each against the rest; NaN of none."""
    from sklearn.metrics import roc_auc_score

    is_label, shares = outputs.is_label, outputs.probabilities
    values = [roc_auc_score(is_label[:, x], shares[:, x]) for x in outputs.told_apart]
    return np.mean(values) if values else math.nan


class Reliability(NamedTuple):
    """By bin of the confidence, of equal width; each array of shape (bins,)."""

    counts: np.ndarray
    confidence: np.ndarray  # its mean in the bin; NaN in an empty one
    accuracy: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Σ share of the bin x |accuracy - confidence|."""
        gaps = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float((gaps * self.counts).sum() / self.counts.sum())


def reliability(confidence: np.ndarray, is_right: np.ndarray, bins: int = BINS) -> Reliability:
    """Whether a classifier is right as often as it is confident (Guo et al. 2017).

    Args:
        confidence: of each prediction, in (0, 1]; a bin holds its upper edge.
        is_right: of each prediction.
    """
    index = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1).astype(int)
    counts = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = (np.bincount(index, values, bins) / counts for values in (confidence, is_right))
        return Reliability(counts, *means)


def reliability_of(probabilities: np.ndarray, labels: np.ndarray) -> Reliability:
    """Of the labels that are found; with several labels of the yes or no to each."""
    found = found_labels(probabilities, labels)
    if labels.ndim == 1:
        confidence = probabilities.max(1)
    else:
        confidence = np.where(found, probabilities, 1 - probabilities)
    return reliability(confidence.ravel(), (found == labels).ravel())


def expected_calibration_error(outputs: Outputs) -> float:
    return reliability_of(outputs.probabilities, outputs.labels).expected_calibration_error


def correlation(name: str) -> Callable[[Outputs], float]:
    """SciPy's; NaN where the predictions or the labels are all the same."""

    def score(outputs: Outputs) -> float:
        from scipy import stats

        found, labels = outputs.probabilities, outputs.labels
        if np.ptp(found) == 0 or np.ptp(labels) == 0:
            return math.nan
        return getattr(stats, name)(found, labels).statistic

    return score


def absolute_error(outputs: Outputs) -> float:
    return np.abs(outputs.probabilities - outputs.labels).mean()


CLASSIFICATION = {
    "loss": loss,
    "accuracy": sklearn_score("accuracy_score"),
    "precision_micro": sklearn_score("precision_score", average="micro", zero_division=0),
    "recall_micro": sklearn_score("recall_score", average="micro", zero_division=0),
    "f1_micro": sklearn_score("f1_score", average="micro", zero_division=0),
    "precision_macro": sklearn_score("precision_score", average="macro", zero_division=0),
    "recall_macro": sklearn_score("recall_score", average="macro", zero_division=0),
    "f1_macro": sklearn_score("f1_score", average="macro", zero_division=0),
    "matthews_correlation": matthews_correlation,
    "roc_auc": roc_auc,
    "expected_calibration_error": expected_calibration_error,
}
# what is measured, and how, by transformers' name of the problem
METRICS: dict[str, dict[str, Callable[[Outputs], float]]] = {
    "single_label_classification": CLASSIFICATION,
    "multi_label_classification": CLASSIFICATION,
    "regression": {
        "loss": loss,
        "pearsonr": correlation("pearsonr"),
        "spearmanr": correlation("spearmanr"),
        "mean_absolute_error": absolute_error,
    },
}


def undefined_metrics(problem_type: str, labels: np.ndarray) -> list[str]:
    """What cannot be measured on these labels: where all rows have the same."""
    if problem_type == "regression":
        return ["pearsonr", "spearmanr"] if np.ptp(labels) == 0 else []
    return ["roc_auc"] if len(np.unique(labels, axis=0)) == 1 else []


def scores(problem_type: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """None: not defined, of labels or predictions that are all the same."""
    outputs = Outputs(logits, probabilities(problem_type, logits), labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the same: it is said before the training
        found = {name: float(score(outputs)) for name, score in METRICS[problem_type].items()}
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def measure(problem_type: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """eval_loss, eval_accuracy and so on, by the `evaluate` module beside this file.

    Args:
        logits: (rows, labels).
        labels: (rows,) numbers, of a multi-label problem (rows, labels) zeros and ones.
    """
    import evaluate
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    file = Path(__file__).with_name("evaluate_metric.py")
    metric = evaluate.load(str(file), problem_type, keep_in_memory=True)
    found = metric.compute(predictions=logits.astype(np.float64), references=labels)
    return {f"eval_{name}": value for name, value in found.items()}
