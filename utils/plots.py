"""The pictures of a run, made from its metrics: loss, learning rate, throughput, domains."""

import math
import warnings
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from utils.files import written_aside
from utils.program import printable
from utils.run_folder import RunFolder

matplotlib.rcParams["text.parse_math"] = False  # a dollar in a name is a dollar
LABEL = 40  # characters of a name
# plot → its panels: the number in the metrics, title, axis label
PANELS = {
    "loss": [("loss", "Loss: {last:.3f} in training at the end", "loss (nats)")],
    "learning_rate": [
        ("learning_rate", "Learning rate: {max:.2g} at its peak", "learning rate"),
        ("grad_norm", "Gradient norm before clipping: median {median:.2g}", "L2 norm"),
    ],
    "throughput": [
        ("tokens_per_second", "Throughput: median {median:,.0f} tokens/s", "tokens/s"),
        ("mfu", "Model FLOPs utilization: median {median:.1%}", "share of the bf16 peak"),
    ],
}
FAULTS = {"loss_spike": "v", "skipped": "x"}  # of a step, and how it is marked
# Okabe & Ito (2008): told apart with any colour vision
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000"]


def write_plots(folder: RunFolder) -> list[Path]:
    """Write plots/*.png, those that the metrics have the numbers for; returns their paths."""
    records = folder.records()
    training = pd.DataFrame([record for record in records if "loss" in record])
    figures = {name: _training_figure(training, records, panels) for name, panels in PANELS.items()}
    figures["domains"] = _domain_figure(training, records)
    return save_figures(folder.path, {name: figure for name, figure in figures.items() if figure})


def save_figures(folder: Path, figures: dict[str, Figure]) -> list[Path]:
    """Write plots/*.png by their names; returns their paths."""
    paths = [folder / "plots" / f"{name}.png" for name in figures]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        with written_aside(path) as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # boxes stand for them
            # 1800 pixels of width: sharp where a page shows them at 900
            figures[path.stem].savefig(file, format="png", dpi=200)
    return paths


def short_name(name: str) -> str:
    """A name from the data as a figure has room for it."""
    name = printable(" ".join(name.split()))
    return name if len(name) <= LABEL else f"{name[: LABEL - 1]}…"


def _training_figure(training: pd.DataFrame, records: list, panels: list) -> Figure | None:
    """A panel a number: a thin line, a smoothed one over it, evaluations and faults as marks."""
    panels = [p for p in panels if p[0] in training and training[p[0]].notna().any()]
    if not panels:
        return None
    figure, all_axes = _make_axes(training, len(panels), 4.5 if len(panels) == 1 else 6)
    step, faults = training["step"], training.filter(list(FAULTS)).eq(True)
    for axes, (key, title, label) in zip(all_axes, panels, strict=True):
        from_zero = key not in ("loss", "grad_norm")
        values = training[key] if from_zero else training[key].mask(faults.any(axis=1))
        half = 0 if key == "learning_rate" else len(step) // 100
        smooth = values.rolling(2 * half + 1, center=True, min_periods=1).mean()
        # at the beginning a narrower window, as long on both sides: the loss falls steeply there
        smooth.iloc[:half] = values[: 2 * half].expanding().mean().iloc[::2].to_numpy()
        axes.plot(step, training[key], color=COLORS[0], alpha=0.3, linewidth=0.7)
        axes.plot(step, smooth, ".-" if len(step) < 30 else "-", color=COLORS[0], label="training")
        found = [(r["step"], r.get(f"eval_{key}")) for r in records]
        points = [point for point in found if point[1] is not None]
        if points:
            name = f"evaluation ({points[-1][1]:.3f} at the end)"
            axes.plot(*zip(*points, strict=True), "o", markersize=5, color=COLORS[1], label=name)
        for fault in () if from_zero else faults:
            marked = step[faults[fault]]
            name = f"{fault.replace('_', ' ')} ({len(marked)})"
            top = {"transform": axes.get_xaxis_transform(), "color": COLORS[3]}
            axes.plot(marked, [0.96] * len(marked), FAULTS[fault], label=name, **top)
        numbers = {"last": smooth.iloc[-1], "max": values.max(), "median": values.median()}
        _finish(axes, title.format(**numbers), label, from_zero)
    return figure


def _domain_figure(training: pd.DataFrame, records: list) -> Figure | None:
    """Bits per byte (or else what there is) of each domain, its name at the end of its line."""
    keys = [key for record in records for key in record if key.endswith("_by_domain")]
    key = min(keys, key=lambda key: key != "eval_bits_per_byte_by_domain", default="")
    evaluations = [(record["step"], record[key]) for record in records if key in record]
    end, latest = evaluations[-1] if evaluations else (0, {})
    # null stands for what was not finite
    finite = {domain: value for domain, value in latest.items() if value is not None}
    last = sorted((value, domain) for domain, value in finite.items() if math.isfinite(value))
    if training.empty or len(last) < 2:
        return None
    height = max(4.5, 1.3 + 0.2 * len(last))
    figure, (axes,) = _make_axes(training, 1, height)
    for index, (_, domain) in enumerate(last):
        line = [(step, values[domain]) for step, values in evaluations if domain in values]
        color = COLORS[index % len(COLORS)]
        axes.plot(*zip(*line, strict=True), "o-", color=color, markersize=3)
    name = key.removeprefix("eval_").removesuffix("_by_domain").replace("_", " ")
    _finish(axes, f"{name.capitalize()} on held-out data, by domain", name)
    axes.autoscale_view()
    points = axes.transData.transform([(end, value) for value, _ in last])
    ends = axes.transAxes.inverted().transform(points)
    places = _spread(list(ends[:, 1]), gap=0.19 / (height - 1.2))
    for line, (value, domain), (x, y), place in zip(
        axes.get_lines(), last, ends, places, strict=True
    ):
        style = {"color": line.get_color(), "transform": axes.transAxes, "clip_on": False}
        axes.text(1.04, place, f"{short_name(domain)}  {value:.3f}", va="center", **style)
        axes.plot([x, 1.03], [y, place], linewidth=0.6, **style)
    return figure


def _make_axes(training: pd.DataFrame, rows: int, height: float) -> tuple[Figure, Any]:
    """Panels above one another over the steps, with the tokens seen by then below their numbers."""
    figure = Figure(figsize=(9, height), layout="constrained")
    panels = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    last, shorten = training.iloc[-1], EngFormatter(places=1, sep="")
    rate = last.get("tokens", 0) / last["step"]

    def tick(step: float, _: int) -> str:
        return f"{step:,.0f}\n{shorten(step * rate).replace('G', 'B')}" if step else "0"

    panels[-1].set_xlim(0, 1.01 * last["step"])
    panels[-1].set_xlabel("step / tokens seen")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    panels[-1].xaxis.set_major_formatter(tick)
    return figure, panels


def _finish(axes: Axes, title: str, label: str, from_zero: bool = False) -> None:
    """Title, label and scale: from zero, or logarithmic over more than a factor of 3."""
    low, high = axes.dataLim.intervaly
    if from_zero:
        axes.set_ylim(bottom=0)
    elif 0 < 3 * low < high:
        axes.set_yscale("log")
        subs = (1, 1.5, 2, 3, 4, 5, 7) if high < 30 * low else (1, 2, 5)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:,.10g}")
    axes.set_ylabel(label)
    finish_axes(axes, title)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="upper right", frameon=False)


def finish_axes(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", weight="bold", size=11)
    axes.set_axisbelow(True)
    axes.grid(color="#E8E8E8")
    axes.spines[["top", "right"]].set_visible(False)


def _spread(places: list[float], gap: float) -> list[float]:
    """Ascending places in [0, 1], pushed apart to both sides until all are `gap` apart."""
    count = len(places)
    inside = [min(max(p, i * gap), 1 - (count - 1 - i) * gap) for i, p in enumerate(places)]
    up = accumulate(inside, lambda below, place: max(below + gap, place))
    down = accumulate(reversed(inside), lambda above, place: min(above - gap, place))
    return [(a + b) / 2 for a, b in zip(up, reversed(list(down)), strict=True)]
