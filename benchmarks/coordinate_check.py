"""Does a learning rate that was found at a small width hold at a larger one?

    python -m benchmarks.coordinate_check
    python -m benchmarks.coordinate_check --measure learning_rate

A small Llama on bytes of the sample corpus, with `mup_base_width` and without. The coordinate check
(Yang et al. 2022, Tensor Programs V, appendix D.1) trains it for some steps at several widths: with
the option activations are of one size at all of them. The second trains it for longer at several
learning rates: with the option the best is the same. Results: benchmarks/results/coordinate_check
and learning_rate_transfer, .md, .json and .png.
"""

import json
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.measurement import describe, write_results
from recipes.causal_lm.pretrain import Arguments as PretrainArguments
from utils.config import command, parse
from utils.files import written_aside
from utils.model import build_model
from utils.optimizer import make_optimizer
from utils.plots import COLORS, finish_axes
from utils.report import markdown_table

HEAD_DIM, LAYERS, TOKENS, ROWS = 16, 2, 64, 8
RANGE = 64**-0.5  # what keeps the size of activations at the base
MODEL = f"initializer_range {RANGE}, heads of {HEAD_DIM}, {LAYERS} layers, {ROWS} x {TOKENS} bytes"
WAYS = ("without mup_base_width", "with mup_base_width")
PACKAGES = ("torch", "transformers")


@dataclass
class Arguments:
    """Train a Llama at several widths, with muP and without."""

    measure: Literal["coordinates", "learning_rate"] = "coordinates"
    widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])  # the first: the base
    steps: int | None = None  # null: 10 for the coordinates, 300 for a learning rate
    seeds: int | None = None  # null: 4 for the coordinates, 1 for a learning rate
    learning_rate: float = 2**-8  # at which the coordinates are measured
    # as powers of 2
    learning_rates: list[int] = field(default_factory=lambda: [-10, -9, -8, -7, -6, -5])
    results: str = "benchmarks/results"


def batches(steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Rows of bytes, each from a place of its own: (ROWS, TOKENS)."""
    lines = Path("data/sample/train-00000-of-00004.jsonl").read_text().splitlines()
    texts = (json.loads(line)["text"] for line in lines)
    found = torch.frombuffer(bytearray("\n".join(texts).encode()), dtype=torch.uint8)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(found) - TOKENS, (ROWS, 1), generator=draw)
        yield found[starts + torch.arange(TOKENS)].long()


def prepared(width: int, base_width: int | None, seed: int) -> tuple[Any, torch.optim.Optimizer]:
    """A model as the recipe initialises it, and its optimizer."""
    arguments = PretrainArguments(seed=seed, weight_decay=0.0, mup_base_width=base_width)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // HEAD_DIM,
        max_position_embeddings=TOKENS,
        initializer_range=RANGE,
        tie_word_embeddings=False,
    )
    model = build_model(arguments, config, transformers.AutoModelForCausalLM)
    return model, make_optimizer(model, arguments)


def losses(
    model: Any, optimizer: torch.optim.Optimizer, rates: list[float], seed: int
) -> Iterator[float]:
    """Of each step, before its update."""
    for rate, rows in zip(rates, batches(len(rates), seed), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        loss = model(input_ids=rows, labels=rows).loss
        yield loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def coordinates(
    width: int, base_width: int | None, steps: int, rate: float, seed: int
) -> dict[str, float]:
    """By place, the mean size of an activation's elements after so many steps."""
    model, optimizer = prepared(width, base_width, seed)
    for _ in losses(model, optimizer, [rate] * steps, seed):
        pass
    found: dict[str, float] = {}
    places = {"embedding": model.model.embed_tokens, "logits": model.lm_head}
    for index, layer in enumerate(model.model.layers, 1):
        places |= {f"attention {index}": layer.self_attn, f"MLP {index}": layer.mlp}
        places |= {f"block {index}": layer}

    def note(name: str, output: Any) -> None:
        values = output[0] if isinstance(output, tuple) else output
        found[name] = values.abs().mean().item()

    with ExitStack() as hooks, torch.no_grad():
        for name, module in places.items():
            hook = module.register_forward_hook(lambda _, __, out, name=name: note(name, out))
            hooks.callback(hook.remove)
        model(input_ids=next(batches(1, seed + 1_000_000)))
    return found


def measure_coordinates(a: Arguments) -> None:
    facts = describe("python -m benchmarks.coordinate_check", PACKAGES)
    steps, seeds = a.steps or 10, a.seeds or 4
    found: dict[str, dict[str, list[float]]] = {}  # by way, place: a mean a width
    for way, base_width in zip(WAYS, (None, a.widths[0]), strict=True):
        of_width = []
        for width in a.widths:
            runs = [coordinates(width, base_width, steps, a.learning_rate, s) for s in range(seeds)]
            of_width.append({k: statistics.mean(run[k] for run in runs) for k in runs[0]})
        found[way] = {name: [values[name] for values in of_width] for name in of_width[0]}
    rows = []
    for name in found[WAYS[0]]:
        for way in WAYS:
            values = found[way][name]
            spread, larger = max(values) / min(values), max(values[1:]) / min(values[1:])
            cells = [f"{value:.3g}" for value in values]
            rows.append([name, way, *cells, f"{spread:.2f}", f"{larger:.2f}"])
    header = [
        "mean size of",
        "at hidden_size",
        *map(str, a.widths),
        "largest / smallest",
        "beyond the base",
    ]
    text = markdown_table(header, rows, "ll" + "r" * (len(a.widths) + 2))
    text += (
        f"\n\nAfter {steps} steps of Adam at a learning rate of {a.learning_rate:.3g}, means of "
        f"{seeds} seeds; {MODEL} a step.\n\n"
        "![Size of activations by width](coordinate_check.png)"
    )
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for axes, way in zip(figure.subplots(1, 2, sharey=True), WAYS, strict=True):
        for color, (name, values) in zip(COLORS, found[way].items(), strict=True):
            axes.plot(a.widths, values, "o-", color=color, label=name)
        axes.set_yscale("log")
        _finish(axes, {width: width for width in a.widths}, f"Activations {way}", "hidden_size")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("mean absolute value of an element")
    _write(a, "coordinate_check", figure, text, facts, found)


def final_loss(width: int, base_width: int | None, steps: int, rate: float, seed: int) -> float:
    """Mean over the last sixth of the steps: text that is seen for the first time."""
    model, optimizer = prepared(width, base_width, seed)
    warmup = steps // 10
    factors = [min((i + 1) / warmup, (steps - i) / (steps - warmup)) for i in range(steps)]
    found = list(losses(model, optimizer, [rate * factor for factor in factors], seed))
    return statistics.mean(found[-(steps // 6) :])


def measure_learning_rate(a: Arguments) -> None:
    facts = describe("python -m benchmarks.coordinate_check", PACKAGES)
    steps, seeds = a.steps or 300, a.seeds or 1
    found: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    for width in a.widths:
        for way, base_width in zip(WAYS, (None, a.widths[0]), strict=True):
            if width == base_width:  # the same model
                found[way][str(width)] = found[WAYS[0]][str(width)]
                continue
            found[way][str(width)] = values = []
            for power in a.learning_rates:
                runs = [final_loss(width, base_width, steps, 2.0**power, s) for s in range(seeds)]
                values.append(statistics.mean(runs))
                print(f"{width} {way}, 2^{power}: {values[-1]:.3f}", flush=True)
    rows = []
    for way in WAYS:
        for width, values in found[way].items():
            best = a.learning_rates[values.index(min(values))]
            rows.append([width, way, *(f"{value:.3f}" for value in values), f"2^{best}"])
    header = ["hidden_size", "", *(f"2^{power}" for power in a.learning_rates), "best"]
    text = markdown_table(header, rows, "rl" + "r" * (len(a.learning_rates) + 1))
    text += (
        f"\n\nTraining loss over the last {steps // 6} of {steps} steps of Adam, in nats a byte, "
        f"seeds: {seeds}; {MODEL} a step, a "
        "tenth of warmup and a linear decay.\n\n"
        "![Loss by learning rate and width](learning_rate_transfer.png)"
    )
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    rates = [2.0**power for power in a.learning_rates]
    for axes, way in zip(figure.subplots(1, 2, sharey=True), WAYS, strict=True):
        for color, (width, values) in zip(COLORS, found[way].items(), strict=False):
            axes.plot(rates, values, "o-", color=color, label=f"hidden_size {width}", markersize=3)
            best = values.index(min(values))
            axes.plot(rates[best], values[best], "o", color=color, markersize=9)
        ticks = {2.0**power: f"2^{power}" for power in a.learning_rates}
        _finish(axes, ticks, f"Loss {way}", "learning rate")
    axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("loss (nats a byte)")
    _write(a, "learning_rate_transfer", figure, text, facts, found)


def _finish(axes: Axes, ticks: dict[float, Any], title: str, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([*ticks], map(str, ticks.values()))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)
    finish_axes(axes, title)


def _write(
    a: Arguments, name: str, figure: Figure, text: str, facts: dict[str, Any], found: dict
) -> None:
    write_results(f"{a.results}/{name}", text, facts, {"measured": found})
    with written_aside(Path(a.results, f"{name}.png")) as file:
        figure.savefig(file, format="png", dpi=200)


def main() -> None:
    arguments = parse(Arguments)
    torch.set_num_threads(1)
    measures = {"coordinates": measure_coordinates, "learning_rate": measure_learning_rate}
    measures[arguments.measure](arguments)


if __name__ == "__main__":
    command(main)
