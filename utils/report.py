"""What people look at after a run, made from the files of its folder alone: plots and model card.

write_plots(folder)
write_card(folder, "A small Llama", "text-generation", USAGE, {"parameters": 1_234_567})
"""

from __future__ import annotations

import datetime
import html
import math
import os
import platform
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from utils.config import read_yaml
from utils.export import export
from utils.files import written_aside
from utils.run_folder import RunFolder
from utils.sources import FORMATS

if TYPE_CHECKING:  # matplotlib and pandas take a second, which the end of a run pays
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from utils.training import Training

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
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "tokenizers")


def write_plots(folder: RunFolder) -> list[Path]:
    """Write plots/*.png, those that the metrics have the numbers for; returns their paths."""
    import pandas as pd

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
        with written_aside(path) as file:
            # 1800 pixels of width: sharp where a page shows them at 900
            figures[path.stem].savefig(file, format="png", dpi=200)
    return paths


def write_card(
    folder: RunFolder, title: str, pipeline_tag: str, usage: str, facts: dict[str, Any], **metadata
) -> Path:
    """Write the model card: README.md of the run with its plots, and that of its model/ without.

    Args:
        usage: Python that uses the model; "{model}" in it stands for the path of the export.
        facts: what else is to be said of the run, in the order in which it is shown.
        metadata: more of the Hub's metadata: tags, base_model, language, license.
    """
    settings = folder.path / "config.yaml"
    config, _ = read_yaml(str(settings))
    latest = {key: value for record in folder.records() for key, value in record.items()}
    results = {k.removeprefix("eval_"): v for k, v in latest.items() if k.startswith("eval_")}
    held_out = ", ".join(_paths(config, "validation")) or "validation"
    counted = {"steps": latest.get("step", 0), "tokens seen": latest.get("tokens", 0)}
    header = _metadata(config, title, pipeline_tag, results, held_out, metadata)
    intro = [header, f"# {title}", markdown_table(["", ""], {**counted, **facts}.items())]
    sections = [
        *_results(results, held_out),
        *_data(latest.get("tokens_by_source")),
        *_samples(latest.get("samples")),
        "## Settings\n\n<details><summary>config.yaml</summary>",
        f"````yaml\n{settings.read_text(encoding='utf-8')}````\n\n</details>",
        f"## Environment\n\n{markdown_table(['', ''], _environment().items())}\n",
    ]
    for path, model in ((folder.path, "model"), (folder.path / "model", ".")):
        if path.is_dir():
            parts = [*intro, *_pictures(path / "plots"), *_how_to_use(usage, model), *sections]
            with written_aside(path / "README.md") as file:
                file.write_text("\n\n".join(parts), encoding="utf-8")
    return folder.path / "README.md"


def _paths(config: dict[str, Any], split: str) -> list[str]:
    sources = config.get(f"{split}_sources", config.get(f"{split}_data")) or ()
    return list(dict.fromkeys(source["path"] for source in sources))


def _metadata(
    config: dict[str, Any],
    title: str,
    pipeline_tag: str,
    results: dict[str, Any],
    held_out: str,
    more: dict[str, Any],
) -> str:
    """What the Hub reads; https://huggingface.co/docs/hub/model-cards."""
    given = config.get("model_name_or_path")
    numbers = {k: v for k, v in results.items() if k != "tokens" and type(v) is not dict}
    scores = [score for score in numbers.items() if math.isfinite(score[1])]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        datasets=[path for path in _paths(config, "train") if _is_hub_name(path)] or None,
        base_model=given if given and _is_hub_name(given) else None,
        model_name=title if scores else None,
        eval_results=[EvalResult(pipeline_tag, held_out, held_out, *s) for s in scores] or None,
        **more,
    )
    return f"---\n{data}\n---"


def _is_hub_name(path: str) -> bool:
    is_file = os.path.exists(path) or path.endswith(FORMATS)
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not is_file


def _pictures(plots: Path) -> list[str]:
    names = [name for name in (*PANELS, "domains") if (plots / f"{name}.png").exists()]
    return [f"![{name.replace('_', ' ')}](plots/{name}.png)" for name in names]


def _how_to_use(usage: str, model: str) -> list[str]:
    code = usage.strip().replace("{model}", model)
    return ["## How to use", "In this folder:", f"```python\n{code}\n```"]


def _results(results: dict[str, Any], held_out: str) -> list[str]:
    """A row for all of the held-out data, and one for each domain."""
    if not results:
        return []
    import pandas as pd

    by_domain = {k.removesuffix("_by_domain"): v for k, v in results.items() if type(v) is dict}
    overall = {k: v for k, v in results.items() if type(v) is not dict}
    table = pd.concat([pd.DataFrame(overall, index=["**all**"]), pd.DataFrame(by_domain)])
    header = ["domain", *table.columns.str.replace("_", " ")]
    return ["## Results", f"On {held_out}:", markdown_table(header, table.itertuples())]


def _data(tokens_by_source: dict[str, int] | None) -> list[str]:
    if not tokens_by_source:
        return []
    total = sum(tokens_by_source.values())
    rows = [[*row, f"{row[1] / total:.1%}"] for row in tokens_by_source.items()]
    rows.append(["**all**", total, "100.0%"])
    return ["## Data", markdown_table(["source", "tokens seen", "share"], rows)]


def _samples(samples: list[dict[str, str]] | None) -> list[str]:
    texts = []
    for sample in samples or ():
        prompt, text = (html.escape(sample[key], quote=False) for key in ("prompt", "text"))
        texts.append(f"<pre><b>{prompt}</b>{text}</pre>")
    return texts and ["## Samples\n\nThe prompt in bold, then what the model wrote:", *texts]


def _environment() -> dict[str, str]:
    versions = {name: version(name) for name in PACKAGES if find_spec(name)}
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpu.read_text()) if cpu.exists() else None
    hardware = f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}"
    if torch.cuda.is_initialized():
        hardware = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    date = str(datetime.date.today())
    return {"Python": platform.python_version(), **versions, "hardware": hardware, "date": date}


def markdown_table(
    header: Sequence[str], rows: Iterable[Iterable[Any]], align: str | None = None
) -> str:
    """A Markdown table; numbers that are not formatted yet get four digits.

    Args:
        align: a letter for each column, "l" or "r"; all to the left where it is not given.
    """

    def cell(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return " ".join(str(value).split()).replace("|", "\\|")
        if math.isnan(value):
            return ""  # a metric that this row does not have
        digits = ",.0f" if value % 1 == 0 else ",.4f" if abs(value) >= 0.1 else ".3g"
        return f"{value:{digits}}"

    line = ["---:" if letter == "r" else "---" for letter in align or "l" * len(header)]
    lines = [header, line, *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
        points = [(r["step"], r[f"eval_{key}"]) for r in records if f"eval_{key}" in r]
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
    last = sorted((value, domain) for domain, value in latest.items() if math.isfinite(value))
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
        axes.text(1.04, place, f"{domain}  {value:.3f}", va="center", **style)
        axes.plot([x, 1.03], [y, place], linewidth=0.6, **style)
    return figure


def _make_axes(training: pd.DataFrame, rows: int, height: float) -> tuple[Figure, Any]:
    """Panels above one another over the steps, with the tokens seen by then below their numbers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

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
    from matplotlib.ticker import LogLocator, NullFormatter

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


def conclude(
    training: Training, title: str, pipeline_tag: str, usage: str, facts: dict[str, Any]
) -> None:
    """Write them, and say where they are and what came out; the end of all processes.

    Args:
        title, pipeline_tag, usage, facts: as for `write_card`.
    """
    if training.is_main:
        a, folder, state = training.arguments, training.folder, training.state
        hours = f"{state.seconds / 3600:.2f} hours"
        facts |= {
            "training": f"{state.step} steps, {hours}; {state.ending}",
            "processes": f"{training.ranks.world_size} x {training.accelerator.device.type}",
            "parallelism": training.engine.describe(),
            "steps skipped": state.skipped_steps,
        }
        model = folder.path / "model"
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        merge = getattr(a, "merge_adapter", False)
        export(training.best_checkpoint(), model, dtype[a.mixed_precision], merge)
        plots = write_plots(folder)
        card = write_card(folder, title, pipeline_tag, usage, facts)
        folder.finish(state.step, state.ending, a, training.fixed["the training data"])
        lines = ["finished", *(f"  {name}: {fact}" for name, fact in facts.items())]
        lines += [f"model: {model}", f"card:  {card}", *(f"plot:  {path}" for path in plots)]
        print("\n".join(lines), flush=True)
    training.accelerator.wait_for_everyone()
    training.accelerator.end_training()
    training.ranks.release()
