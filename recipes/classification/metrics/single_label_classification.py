"""Scores of a classifier that picks one label: a module for `evaluate.load(<this file>)`."""

import datasets
import evaluate
import numpy as np
from sklearn import metrics

from calibration import reliability
from metrics.label_scores import label_scores


class SingleLabelClassification(evaluate.Metric):
    """As scikit-learn's functions of the same names, and the expected calibration error."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Guo et al. 2017, On Calibration of Modern Neural Networks",
            inputs_description="predictions: the probability of each label; references: its number",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float]:
        probabilities, labels = np.array(predictions), np.array(references)
        found = probabilities.argmax(1)
        scores = label_scores(labels, found)
        scores["matthews_correlation"] = metrics.matthews_corrcoef(labels, found)
        # one label against the rest; those that all or none of the references have are left out
        areas = [
            metrics.roc_auc_score(labels == label, probabilities[:, label])
            for label in range(probabilities.shape[1])
            if 0 < (labels == label).sum() < len(labels)
        ]
        scores["roc_auc"] = np.mean(areas) if areas else 0.5
        calibration = reliability(probabilities.max(1), found == labels)
        scores["expected_calibration_error"] = calibration.expected_calibration_error
        return {name: float(value) for name, value in scores.items()}
