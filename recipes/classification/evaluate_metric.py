"""The scores of a classifier or a regression: `evaluate.load(<this file>, <problem_type>)`."""

import datasets
import evaluate
import numpy as np

# evaluate copies that file beside its copy of this one
from .classification_metrics import scores


class EvaluateMetric(evaluate.Metric):
    """What `METRICS` has of the problem type, as scikit-learn and SciPy have it."""

    def _info(self) -> evaluate.MetricInfo:
        label = {
            "single_label_classification": datasets.Value("int64"),
            "multi_label_classification": datasets.Sequence(datasets.Value("int64")),
            "regression": datasets.Value("float64"),
        }
        logits = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Guo et al. 2017, On Calibration of Modern Neural Networks",
            inputs_description="predictions: the logits of each row; references: its label, or 0 "
            "and 1 of each label, or its number",
            features=datasets.Features(
                {"predictions": logits, "references": label[self.config_name]}
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list) -> dict[str, float | None]:
        return scores(self.config_name, np.array(predictions), np.array(references))
