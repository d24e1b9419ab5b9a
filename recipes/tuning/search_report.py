"""What people look at of a search: lines on the screen, a card, and a picture."""

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from search_space import place
from trial_records import Metric
from utils.files import written_aside
from utils.report import escaped, markdown_table

BEST = 5  # trials on the screen
BEST_COLOR = "#D55E00"
Records = Sequence[dict[str, Any]]


def told(settings: dict[str, Any]) -> str:
    """Settings in a line."""
    return "  ".join(f"{name} {short(value)}" for name, value in settings.items())


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def ending(record: dict[str, Any]) -> str:
    """complete, or pruned: 9.0213 at step 15."""
    return f"{record['status']}: {record['reason']}".removesuffix(": ")


def time_left(records: Records, trials: int) -> str:
    """As long as those before have taken; nothing before the first is done."""
    seconds = [record["seconds"] for record in records]
    if not seconds:
        return ""
    left = sum(seconds) / len(seconds) * (trials - len(records))
    return f"  ({timedelta(seconds=round(left))} left)"


def summary(records: Records, metric: Metric) -> str:
    """The best trials in a table, and how many there were."""
    ranked = metric.ranked(records)[:BEST]
    header = ["trial", metric.name, *(ranked[0]["settings"] if ranked else ())]
    rows = [
        [str(r["trial"]), f"{r['value']:.4f}", *map(short, r["settings"].values())] for r in ranked
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (header, *rows)
    ]
    return "\n".join([counted(records), *(lines if ranked else ())])


def counted(records: Records) -> str:
    counts = {
        status: sum(record["status"] == status for record in records)
        for status in ("complete", "pruned", "failed")
    }
    found = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return f"{len(records)} trials: {found}" if records else "no trials yet"


def write_card(folder: Path, records: Records, metric: Metric, script: str, rerun: str) -> Path:
    """README.md: all trials, the best first, and how the best one is run."""
    ranked = metric.ranked(records)
    others = [record for record in records if record not in ranked]
    names = [*records[0]["settings"]]
    rows = [
        [
            f"**{record['trial']}**" if record in ranked[:1] else record["trial"],
            record["value"] if record in ranked else None,
            *(escaped(short(value)) for value in record["settings"].values()),
            escaped(ending(record)),
            f"{record['seconds']:.0f}",
        ]
        for record in ranked + others
    ]
    header = ["trial", metric.name, *map(escaped, names), "", "seconds"]
    table = markdown_table(header, rows, "r" * (2 + len(names)) + "lr")
    parts = [
        f"# Search: {escaped(script)}",
        f"{counted(records)}; the {metric.best} {metric.name}, of validation data, is the best.",
        *(["The best one, which has not seen test data:", f"    {rerun}"] if ranked else ()),
        "![search](plots/search.png)",
        table,
    ]
    with written_aside(folder / "README.md") as file:
        file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return folder / "README.md"


def write_plot(folder: Path, records: Records, metric: Metric, settings: dict[str, Any]) -> Path:
    """plots/search.png: the metric against each setting, from trial to trial, from step to step.

    Args:
        settings: what was searched: the lists and ranges.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    from utils.plots import finish_axes, save_figures, short_name

    count = len(settings) + 2
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.5 * columns, 0.6 + 3.2 * rows), layout="constrained")
    panels = [*figure.subplots(rows, columns, squeeze=False).flatten()]
    for axes in panels[count:]:
        axes.remove()
    for axes, (name, values) in zip(panels, settings.items(), strict=False):
        found = [place(values, record["settings"][name]) for record in records]
        if isinstance(values, list):
            axes.set_xticks(range(len(values)), [short_name(short(value)) for value in values])
            axes.set_xlim(-0.5, len(values) - 0.5)
        elif values.get("log"):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        _mark(axes, found, records, metric)
        finish_axes(axes, short_name(name))
    by_trial, by_step = panels[count - 2 : count]
    numbers = [record["trial"] for record in records]
    _mark(by_trial, numbers, records, metric)
    ranked = [metric.ranked(records[:number])[:1] for number in numbers]
    so_far = [(n, found[0]["value"]) for n, found in zip(numbers, ranked, strict=True) if found]
    if so_far:
        by_trial.step(*zip(*so_far, strict=True), where="post", color=BEST_COLOR, linewidth=1)
    for axes in (by_trial, by_step):
        axes.xaxis.get_major_locator().set_params(integer=True)
    finish_axes(by_trial, "trial (line: the best so far)")
    best = metric.ranked(records)[:1]
    for record in sorted(records, key=lambda record: record in best):
        points = [(step, value) for step, value in record["evaluations"] if value is not None]
        if points:
            _, style, color, _ = _look(record, best)
            by_step.plot(*zip(*points, strict=True), style, color=color, markersize=3)
    finish_axes(by_step, "step of the evaluation")
    for axes in panels[:count]:
        low, high = axes.dataLim.intervaly
        if 0 < 3 * low < high:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(metric.name)
    handles = dict(zip(*reversed(by_trial.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False
    )
    return save_figures(folder, {"search": figure})[0]


def _look(record: dict[str, Any], best: Records) -> tuple[str, str, str, int]:
    """(name in the legend, line, colour, size of the mark) of a trial."""
    if record in best:
        return "best", "*-", BEST_COLOR, 14
    looks = {
        "complete": ("complete", "o-", "#0072B2", 6),
        "pruned": ("pruned", "o:", "#7F7F7F", 5),
        "failed": ("failed", "x:", "#CC79A7", 7),
    }
    return looks[record["status"]]


def _mark(axes: Any, places: list[Any], records: Records, metric: Metric) -> None:
    """Each trial at its place: its metric, of a pruned one the last; a failed one at the top."""
    best = metric.ranked(records)[:1]
    for x, record in sorted(zip(places, records, strict=True), key=lambda pair: pair[1] in best):
        name, style, color, size = _look(record, best)
        finite = [value for _, value in record["evaluations"] if value is not None]
        value = record["value"] if record["value"] is not None else [None, *finite][-1]
        more = {"color": color, "markersize": size, "label": name}
        more |= {"markerfacecolor": "none"} if name == "pruned" else {}
        if name == "failed" or value is None:
            more["transform"], value = axes.get_xaxis_transform(), 0.97
        axes.plot([x], [value], style[0], **more)
