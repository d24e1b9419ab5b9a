"""What people look at of a classifier: its predictions as a file, confusion and calibration."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from classification_metrics import Outputs, Reliability, losses_of, reliability_of
from labelled_texts import LabelledText
from utils.plots import COLORS, finish_axes, save_figures, short_name


def prediction_records(
    rows: list[LabelledText], names: list[str], outputs: Outputs
) -> Iterator[dict[str, Any]]:
    """In the order of the rows: where each stands, its texts, loss, label, prediction and
    probabilities; the mean of the losses is eval_loss."""
    probabilities, labels = outputs.probabilities, outputs.labels
    columns = probabilities.tolist(), labels.tolist(), losses_of(outputs).mean(1).tolist()
    for row, values, label, loss in zip(rows, *columns, strict=True):
        texts = dict(zip(("text", "text_pair"), row.texts, strict=False))
        what = {"row": row.place, **texts, "loss": loss}
        if probabilities.ndim == 1:
            yield what | {"label": label, "prediction": values}
            continue
        if labels.ndim == 2:
            pick = [value >= 0.5 for value in values]
            found = [n for n, is_found in zip(names, pick, strict=True) if is_found]
            true = [n for n, is_true in zip(names, label, strict=True) if is_true]
        else:
            found, true = names[int(np.argmax(values))], names[label]
        shares = dict(zip(names, values, strict=True))
        yield what | {"label": true, "prediction": found, "probabilities": shares}


def write_figures(
    folder: Path, names: list[str], probabilities: np.ndarray, labels: np.ndarray
) -> list[Path]:
    """Of labels plots/reliability.png, of one a row plots/confusion_matrix.png; their paths.

    Of a regression plots/predictions.png.
    """
    figures = {}
    if probabilities.ndim == 1:
        figures["predictions"] = _scatter(names[0], probabilities, labels)
    else:
        if labels.ndim == 1:
            figures["confusion_matrix"] = _confusion(names, probabilities.argmax(1), labels)
        figures["reliability"] = _reliability(reliability_of(probabilities, labels))
    return save_figures(folder, figures)


def _square(side: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(side, side), layout="constrained")
    return figure, figure.subplots()


def _confusion(names: list[str], found: np.ndarray, labels: np.ndarray) -> Figure:
    counts = confusion_matrix(labels, found, labels=range(len(names)))
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    side = min(4 + 0.5 * len(names), 20)
    figure, axes = _square(side)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 30:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, count or "", ha="center", va="center", color=color, size=9)
        axes.set_xticks(range(len(names)), map(short_name, names), rotation=45, ha="right")
        axes.set_yticks(range(len(names)), map(short_name, names))
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    title = f"Confusion: {np.trace(counts) / counts.sum():.1%} of {counts.sum():,} are right"
    axes.set_title(title, loc="left", weight="bold", size=11)
    return figure


def _reliability(bins: Reliability) -> Figure:
    """Accuracy over confidence; the area of a point is the share of the predictions in its bin."""
    figure, axes = _square(6)
    axes.plot([0, 1], [0, 1], color=COLORS[6], linewidth=0.8, label="as often right as confident")
    axes.plot(bins.confidence, bins.accuracy, color=COLORS[0], linewidth=0.8)
    sizes = 20 + 600 * bins.counts / bins.counts.sum()
    axes.scatter(bins.confidence, bins.accuracy, sizes, color=COLORS[0], alpha=0.6, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", aspect="equal")
    axes.set_xlabel("confidence (areas: shares of the predictions)")
    finish_axes(axes, f"Expected calibration error: {bins.expected_calibration_error:.3f}")
    axes.legend(loc="upper left", frameon=False)
    return figure


def _scatter(name: str, found: np.ndarray, labels: np.ndarray) -> Figure:
    """What is predicted over what is true."""
    figure, axes = _square(6)
    axes.axline((labels[0], labels[0]), slope=1, color=COLORS[6], linewidth=0.8, label="equal")
    axes.scatter(labels, found, 8, color=COLORS[0], alpha=0.4, label="a row")
    axes.set(xlabel=short_name(name), ylabel="prediction")
    finish_axes(axes, f"Mean absolute error: {np.abs(found - labels).mean():.3g}")
    axes.legend(loc="upper left", frameon=False)
    return figure
