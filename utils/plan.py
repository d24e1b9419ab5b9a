"""What a run takes, known from its settings alone: parameters, FLOPs, memory, time and cost.

`--dry_run` prints it, and the table of ds_configs/README.md is that of a 7B model.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from textwrap import shorten
from typing import Any, Literal, NamedTuple

import torch
import transformers

from utils.config import InputError, Settings
from utils.memory import (
    OPTIMIZER_BYTES,
    Activations,
    activations,
    parameter_count,
    state_bytes,
)
from utils.model import empty_model
from utils.optimizer import refusal
from utils.progress import PEAK_FLOPS
from utils.ranks import launched_with, launched_world_size, launched_zero_stage
from utils.report import markdown_table

# of a layer that slides, by its kind: which setting has the number of tokens that it sees
WINDOWS = {
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "local": "window_size",
}
NO_SCORES = ("linear", "mamba", "conv", "recurrent")  # kinds of layers have one of these words
# GiB of a GPU, of which communication, what the allocator leaves between and libraries want a tenth
GPU_MEMORY = {"A100": 80, "B200": 180, "H100": 80, "H200": 140, "L40S": 45}
USABLE = 0.9
LARGE = 2**30  # bytes, from which on sizes are in GiB
WAYS = ("eager", "compiled", "checkpointed")
NOTHING = Activations((0, 0), (0, 0))


def flops_per_token(
    config: Any, sequence_length: int, auto_model: Any = None, predicted: float = 1.0
) -> int:
    """Floating-point operations of forward and backward for one token: 6·N + 12·L·A·S.

    N is the parameters without the input embeddings, L the layers, A the width of attention and S
    the sequence length (PaLM, Chowdhery et al. 2022, appendix B), see `attention_flops`. Recomputed
    activations are not counted, masked attention scores are, and so are all experts of a mixture.
    torchtitan counts half of the attention, what is not masked.

    Args:
        predicted: the share of the tokens for which the head is computed. That for pairs is
            computed once a row.
    """
    counts = parameter_count(config, auto_model)
    skipped = (1 - predicted) * counts["head"] + (1 - 1 / sequence_length) * counts["pair_head"]
    parameters = counts["without_input_embeddings"] + counts["computed_again"] - round(skipped)
    return 6 * parameters + attention_flops(config, sequence_length)


def attention_flops(config: Any, sequence_length: int) -> int:
    """Of the scores and values of one token, forward and backward: 12·A·S, summed over the layers.

    A is heads x their width (where keys and values differ, the mean of both), S the sequence
    length, or the window of a layer that slides. Layers without scores add nothing.
    """
    text = config.get_text_config()
    layers, heads = getattr(text, "num_hidden_layers", 0), getattr(text, "num_attention_heads", 0)
    if not isinstance(layers, int) or not isinstance(heads, int):
        layers, heads = 0, 0  # BLT has several of both
    width = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // max(heads, 1)
    if of_values := getattr(text, "v_head_dim", None):  # DeepSeek's latent attention
        keys = text.qk_nope_head_dim + text.qk_rope_head_dim
        width = (keys + of_values) / 2
    lists = (
        getattr(text, n, None) for n in ("layer_types", "layers_block_type", "attention_layers")
    )
    slides = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    default = ["sliding_attention" if slides else "full_attention"] * layers
    seen = 0
    for kind in next(filter(None, lists), default)[:layers]:
        window = getattr(text, WINDOWS.get(kind, ""), None) or sequence_length
        has_scores = not any(word in kind for word in NO_SCORES)
        seen += has_scores * min(window, sequence_length)
    return round(12 * heads * width * seen)


@dataclass
class Hardware:
    """What is planned for."""

    gpu: Literal["A100", "B200", "H100", "H200", "L40S"] = "H100"
    gpus: int | None = None  # null: 1, 8 and 64; under a launcher its processes
    gpu_memory: float | None = None  # GiB that a run must fit; null: of a GPU that is here, if any
    mfu: float = 0.4  # share of the GPU's dense bf16 peak that the run is expected to reach
    price_per_gpu_hour: float | None = None


@dataclass
class PlanArguments(Settings):
    """What `--dry_run` prints."""

    dry_run: bool = False  # print parameters, FLOPs, memory, time and cost, and load nothing
    plan: Hardware = field(default_factory=Hardware)

    def check(self) -> None:
        if not 0 < self.plan.mfu <= 1:
            raise InputError(f"plan.mfu must be in (0, 1], not {self.plan.mfu}")
        for name in ("gpus", "gpu_memory", "price_per_gpu_hour"):
            value = getattr(self.plan, name)
            if value is not None and value <= 0:
                raise InputError(f"plan.{name} must be more than 0, not {value}")
        super().check()


class Layout(NamedTuple):
    """How a run may be spread, and the bytes that it then takes of each GPU."""

    name: str
    gpus: int
    state: dict[str, int]
    activations: Activations

    def __str__(self) -> str:
        if self.name == "DDP":
            return "DDP, or one GPU"
        return f"{self.name} on {self.gpus} GPU{'s' if self.gpus > 1 else ''}"

    def takes(self, rows: int) -> int:
        """Bytes with micro-batches of so many rows."""
        return sum(self.state.values()) + self.activations.of(rows)

    def largest(self, room: float, arguments: Any) -> int:
        """The micro-batch, of those that make up the global batch, that so many bytes hold."""
        share = arguments.global_batch_size // self.gpus
        rows = min(share, self.activations.rows(room - sum(self.state.values())))
        return next((n for n in range(rows, 0, -1) if share % n == 0), 0)


def plan(
    config: Any,
    arguments: Any,
    phases: Sequence[tuple[int, int | None]] = (),
    auto_model: Any = None,
    predicted: float = 1.0,
    flops: Callable[[int], int] | None = None,
    parts: dict[str, int] | None = None,
    build: Callable[[Any], torch.nn.Module] | None = None,
    **settings: Any,
) -> str:
    """What `--dry_run` prints: parameters, steps, FLOPs, time, cost, memory by layout.

    Args:
        arguments: a `TrainingArguments` that is a `PlanArguments`.
        phases: (sequence length, steps) one after the other; none: all steps are alike.
        predicted: as for `flops_per_token`.
        flops: of a token, by the sequence length, where not all is trained; so are
        parts, settings: as for `state_bytes`.
        build: as for `activations`, where the model is not that of the config alone.

    Raises:
        InputError: the run does not fit the GPUs that are named or here.
    """
    a, counts = arguments, parameter_count(config, auto_model)
    total = counts["total"] if parts is None else parts["trained"] + parts["frozen"]
    of_it = f"{counts['without_input_embeddings']:,} without the input embeddings"
    if parts is not None:
        of_it = f"{parts['trained']:,} of them trained, {parts['trained'] / total:.2%}"
    flops_of = flops or partial(flops_per_token, config, auto_model=auto_model, predicted=predicted)
    lines = [f"model        {config.model_type}, {total:,} parameters ({of_it})"]
    operations = tokens = 0
    for length, steps in phases or [(a.row_length, a.total_steps)]:
        each = flops_of(length)
        halved = each - attention_flops(config, length) // 2
        batch = a.global_batch_size * length
        lines += [
            f"step         {a.global_batch_size:,} sequences x {length:,} = {batch:,} tokens",
            f"compute      {each:,} FLOPs a token (6 N + 12 L A S)",
            f"             {halved:,} as torchtitan counts, half of the attention",
        ]
        if steps is not None:
            lines.append(f"run          {steps:,} steps = {steps * batch:,} tokens")
            operations += steps * batch * each
            tokens += steps * batch
    gpus = _gpus(a)
    speed = a.plan.mfu * PEAK_FLOPS[a.plan.gpu]  # FLOP/s
    rate = speed / (operations / tokens if tokens else each)
    lines.append(
        f"speed        {rate:,.0f} tokens/s = {rate * 86400:,.0f} a day, on each {a.plan.gpu} "
        f"at {a.plan.mfu:.0%} MFU"
    )
    if operations:
        hours = operations / speed / 3600
        by_gpus = ", ".join(f"{hours / 24 / n:,.4g} on {n}" for n in gpus)
        lines.append(f"days         {by_gpus} (all of {operations:.3g} FLOPs)")
        if price := a.plan.price_per_gpu_hour:
            lines.append(f"cost         {hours * price:,.0f}: {hours:,.0f} GPU hours at {price:g}")
    parts = parts or {"trained": counts["total"], "embeddings": counts["embeddings"]}
    build = build or partial(empty_model, auto_model=auto_model)
    is_causal = auto_model in (None, transformers.AutoModelForCausalLM)
    try:
        held = activations(build, config, a.row_length, a.mixed_precision, is_causal, predicted)
        note = ""
    except Exception as error:  # models fail in ways of their own, as where data decide on shapes
        held = {key: NOTHING for key in product(WAYS, (False, True))}
        note = f"which this model does not tell ({shorten(str(error), 60)}), are not counted"
    layouts = partial(_layouts, parts, held, a.mixed_precision, settings)
    if not note:
        _check_fit(a, layouts, gpus)
    return "\n".join([*lines, "", *_tables(a, layouts, held, gpus, note)])


def _gpus(arguments: Any) -> list[int]:
    if (launched := launched_world_size()) > 1:
        return [launched]
    return [arguments.plan.gpus] if arguments.plan.gpus else [1, 8, 64]


def _way(arguments: Any) -> str:
    if arguments.gradient_checkpointing:
        return "checkpointed"
    return "compiled" if arguments.torch_compile else "eager"


def _layouts(
    parts: dict[str, int],
    held: dict[tuple[str, bool], Activations],
    mixed_precision: str,
    settings: dict[str, Any],
    gpus: Iterable[int],
    optim: str,
    way: str,
) -> list[Layout]:
    """All that the optimizer and the weights can be in: DDP, whose GPUs are all alike, first."""
    stages = {"ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3, "FSDP2": 0}
    if settings.get("load_in_4bit"):
        del stages["ZeRO-3"], stages["FSDP2"]
    able = [name for name, stage in stages.items() if not refusal(optim, stage, not stage, 2)]
    named = [("DDP", 1)]
    for n in gpus:
        named += [(name, n) for name in able if n > 1 or name == "ZeRO-2"]
    found = []
    for name, n in named:
        state = state_bytes(parts, name, n, mixed_precision, optim=optim, **settings)
        is_half = (name != "DDP" and mixed_precision != "no") or optim == "adamw_bf16"
        found.append(Layout(name, n, state, held[way, is_half]))
    return found


def _room(arguments: Any) -> float:
    """Bytes of a GPU."""
    memory = arguments.plan.gpu_memory
    if memory is None and torch.cuda.is_available():
        return USABLE * torch.cuda.get_device_properties(0).total_memory
    return USABLE * 2**30 * (memory or GPU_MEMORY[arguments.plan.gpu])


def _check_fit(arguments: Any, layouts: Callable[..., list[Layout]], gpus: list[int]) -> None:
    """Raises InputError, with the nearest that fits, where a GPU is stated or here."""
    a, room, rows, way = (
        arguments,
        _room(arguments),
        arguments.per_device_batch_size,
        _way(arguments),
    )
    if a.plan.gpu_memory is None and not torch.cuda.is_available():
        return
    mine = layouts(gpus, a.optim, way)
    if launched_world_size() > 1:
        stage = launched_zero_stage()
        name = f"ZeRO-{stage}" if stage else "FSDP2" if launched_with("FSDP") else "DDP"
        mine = [layout for layout in mine if layout.name == name]
    if any(layout.takes(rows) <= room for layout in mine):
        return
    least = min(mine, key=lambda layout: layout.takes(rows))
    tries = [(way, gpus), ("checkpointed", gpus)]
    tries += [("checkpointed", [2**power]) for power in range(11) if 2**power > max(gpus)]
    for how, counts in tries:
        fitting = (x for x in layouts(counts, a.optim, how) if x.largest(room, a))
        if nearest := next(fitting, None):
            again = ", gradient_checkpointing: true" if how == "checkpointed" != way else ""
            size = min(rows, nearest.largest(room, a))
            advice = f"the nearest that does: {nearest}, per_device_batch_size {size}{again}"
            break
    else:
        advice = "nor does anything on 1,024 GPUs"
    raise InputError(
        f"per_device_batch_size {rows} x {a.row_length:,} does not fit: {least} takes "
        f"{least.takes(rows) / 2**30:.1f} GiB, {room / 2**30:.1f} of a GPU can be used; {advice}"
    )


def _tables(
    arguments: Any,
    layouts: Callable[..., list[Layout]],
    held: dict[tuple[str, bool], Activations],
    gpus: list[int],
    note: str,
) -> list[str]:
    a, way, room = arguments, _way(arguments), _room(arguments)
    mine = layouts(gpus, a.optim, way)
    is_large = sum(mine[0].state.values()) >= LARGE
    unit, size = ("GiB", 2**30) if is_large else ("MiB", 2**20)
    rows = a.per_device_batch_size

    def shown(value: float) -> str:
        return f"{value / size:.1f}"

    def row(name: str, layout: Layout) -> list[str]:
        parts = [*layout.state.values(), layout.activations.of(rows)]
        sizes = [
            *map(shown, parts),
            shown(layout.takes(rows)),
            str(layout.largest(room, a) or "none"),
        ]
        if note:
            sizes[len(layout.state)], sizes[-1] = "?", "?"
        return [name, *sizes]

    lines = [row(str(layout), layout) for layout in mine]
    for optim in OPTIMIZER_BYTES:
        if optim != a.optim and (optim != "adamw_bf16" or a.mixed_precision == "bf16"):
            lines.append(row(f"DDP, {optim}", layouts(gpus, optim, way)[0]))
    header = ["layout", *mine[0].state, "activations", "in all", "largest micro-batch"]
    kinds = {"DDP": False, "ZeRO, FSDP2": a.mixed_precision != "no"}
    by_way = [[k, *(shown(held[w, half].of(rows)) for w in WAYS)] for k, half in kinds.items()]
    lines_of_ways = ["activations, the most that forward and backward hold beside the rest:", ""]
    lines_of_ways.append(markdown_table(["", *WAYS], by_way))
    return [
        f"{unit} of a GPU, micro-batches of {rows} x {a.row_length:,}, {a.optim}, mixed_precision: "
        f"{a.mixed_precision}, {way};",
        f"the largest micro-batch is that of {room / 2**30:.0f} GiB:",
        "",
        markdown_table(header, lines),
        "",
        *([f"activations, {note}"] if note else lines_of_ways),
    ]
