"""The scores that classifiers of one label and of several have in common."""

import numpy as np
from sklearn import metrics


def label_scores(labels: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Accuracy, and precision, recall and F1, micro and macro; as scikit-learn has them.

    Args:
        labels, found: numbers of shape (rows,), or 0 and 1 of shape (rows, labels).
    """
    scores = {"accuracy": metrics.accuracy_score(labels, found)}
    for average in ("micro", "macro"):
        values = metrics.precision_recall_fscore_support(
            labels, found, average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), values, strict=False):
            scores[f"{name}_{average}"] = value
    return scores
