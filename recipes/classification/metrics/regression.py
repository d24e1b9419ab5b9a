"""Scores of a regression: a module for `evaluate.load(<this file>)`."""

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_absolute_error


class Regression(evaluate.Metric):
    """As SciPy's and scikit-learn's functions of the same names.

    Numbers that are all the same correlate with nothing: 0, where SciPy has not a number.
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: numbers",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        scores = {"pearsonr": 0.0, "spearmanr": 0.0}
        if np.ptp(predictions) > 0 and np.ptp(references) > 0:
            scores["pearsonr"] = float(pearsonr(predictions, references).statistic)
            scores["spearmanr"] = float(spearmanr(predictions, references).statistic)
        scores["mean_absolute_error"] = float(mean_absolute_error(references, predictions))
        return scores
