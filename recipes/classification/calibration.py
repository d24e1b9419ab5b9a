"""Whether a classifier is right as often as it is confident (Guo et al. 2017)."""

from typing import NamedTuple

import numpy as np

BINS = 15


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
    """
    Args:
        confidence: of each prediction, in (0, 1]; a bin holds its upper edge.
        is_right: of each prediction.
    """
    index = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1).astype(int)
    counts = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = (np.bincount(index, values, bins) / counts for values in (confidence, is_right))
        return Reliability(counts, *means)
