"""Scores of a classifier that says of each label whether it applies: for `evaluate.load`."""

import datasets
import evaluate
import numpy as np
from sklearn import metrics

from calibration import reliability
from metrics.label_scores import label_scores


class MultiLabelClassification(evaluate.Metric):
    """As scikit-learn's functions of the same names; a label applies from probability 0.5 on.

    The accuracy is that of whole sets of labels. Matthews' correlation and the area under the ROC
    curve are means over the labels; those that all or none of the references have are left out.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Guo et al. 2017, On Calibration of Modern Neural Networks",
            inputs_description="predictions: the probability of each label; references: 0 or 1",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[list[int]]
    ) -> dict[str, float]:
        probabilities, labels = np.array(predictions), np.array(references)
        found = (probabilities >= 0.5).astype(int)
        scores = label_scores(labels, found)
        told_apart = [x for x in range(labels.shape[1]) if 0 < labels[:, x].sum() < len(labels)]
        correlations = [metrics.matthews_corrcoef(labels[:, x], found[:, x]) for x in told_apart]
        areas = [metrics.roc_auc_score(labels[:, x], probabilities[:, x]) for x in told_apart]
        scores["matthews_correlation"] = np.mean(correlations) if told_apart else 0.0
        scores["roc_auc"] = np.mean(areas) if told_apart else 0.5
        confidence = np.where(found, probabilities, 1 - probabilities).ravel()
        calibration = reliability(confidence, (found == labels).ravel())
        scores["expected_calibration_error"] = calibration.expected_calibration_error
        return {name: float(value) for name, value in scores.items()}
