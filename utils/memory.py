"""What a training run will need, known from the model's config alone: nothing is loaded.

`--dry_run true` prints it, and the table of ds_configs/README.md is `memory_table` of a 7B model.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from utils.adapters import AdapterArguments, check_trained_part
from utils.model import PAIR_HEADS, empty_model

PAIR_MODULES = {"pooler", *PAIR_HEADS}


def parameter_count(config: Any, auto_model: Any = AutoModelForCausalLM) -> dict[str, int]:
    """The parameters of an `empty_model`: exact for every architecture; tied weights count once.

    Returns:
        "total"; "without_input_embeddings": less every embedding that is only looked up, by token
        or by position (a matrix tied to the output projection multiplies there, and stays);
        "head": of these, what comes after the base model, to the matrix of the logits;
        "pair_head": of these, what only the first token of a pair of segments goes through (BERT's
        pooler and its classifier); "computed_again": where layers share their weights (ALBERT),
        what each use after the first would add.
    """
    model = empty_model(config, auto_model)
    output = model.get_output_embeddings()
    lookups = {
        module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        and (output is None or module.weight is not output.weight)
    }
    parameters = dict(model.named_parameters())
    pair_head = {w for name, w in parameters.items() if {*name.split(".")} & PAIR_MODULES}
    head = {*parameters.values()} - {*model.base_model.parameters()} - pair_head
    head |= set() if output is None else {output.weight}  # may be tied to the base model
    total = _size(parameters.values())
    return {
        "total": total,
        "without_input_embeddings": total - _size(lookups),
        "head": _size(head),
        "pair_head": _size(pair_head),
        "computed_again": _computed_again(model),
    }


def _size(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _computed_again(model: torch.nn.Module) -> int:
    groups = getattr(model.config, "num_hidden_groups", None)
    if not groups:
        return 0
    shared = (p for name, p in model.named_parameters() if "layer_groups" in name)
    uses = model.config.num_hidden_layers / groups
    return round((uses - 1) * _size(shared))


def flops_per_token(
    config: Any,
    sequence_length: int,
    auto_model: Any = AutoModelForCausalLM,
    predicted: float = 1.0,
) -> int:
    """Floating-point operations of forward and backward for one token: 6·N + 12·L·H·S.

    N is the parameters without the input embeddings, L the layers, H the hidden size and S the
    sequence length (PaLM, Chowdhery et al. 2022, appendix B, where the heads' width times their
    number is H). Recomputed activations are not counted, masked attention scores are, and so are
    all experts of a mixture.

    Args:
        predicted: the share of the tokens for which the head is computed. That for pairs is
            computed once a row.
    """
    counts = parameter_count(config, auto_model)
    skipped = (1 - predicted) * counts["head"] + (1 - 1 / sequence_length) * counts["pair_head"]
    parameters = counts["without_input_embeddings"] + counts["computed_again"] - round(skipped)
    text = config.get_text_config()
    attention = 12 * text.num_hidden_layers * text.hidden_size * sequence_length
    return 6 * parameters + attention


def model_state_bytes(
    parameters: int,
    zero_stage: int,
    world_size: int,
    mixed_precision: str,
    offload: bool = False,
) -> dict[str, int]:
    """Bytes on each GPU that training with AdamW holds from step to step.

    After ZeRO (Rajbhandari et al. 2020, section 3.1), as DeepSpeed 0.19 keeps them. Bytes for a
    parameter, before ZeRO splits them over the processes (stage 1 the optimizer, stage 2 the
    gradients too, stage 3 all three):

                             weights  gradients  optimizer
        ZeRO, fp32              4         4      4 + 8 (a second copy of the weights, moments)
        ZeRO, bf16 or fp16      2         2      4 + 8 (fp32 master weights, moments)
        stage 0, any            4         4          8 (autocast keeps the weights in fp32)

    Gradients accumulate in the precision of the weights, unless the DeepSpeed config sets
    `data_types.grad_accum_dtype`. Not counted: activations, communication buckets, and the fp32
    copy of its gradients that a process makes while it steps.

    Args:
        parameters: those of the whole model, all of them trained.
        zero_stage: 0 (DistributedDataParallel) to 3.
        mixed_precision: "no", "bf16" or "fp16".
        offload: as in ds_configs/zero2_offload.json and zero3_offload.json: gradients and
            optimizer are in the host's memory, under stage 3 the weights too.

    Returns:
        "weights", "gradients" and "optimizer".
    """
    if zero_stage not in (0, 1, 2, 3) or mixed_precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"no such setting: {zero_stage=}, {mixed_precision=}")
    width = 4 if zero_stage == 0 or mixed_precision == "no" else 2
    per_parameter = {"weights": width, "gradients": width, "optimizer": 12 if zero_stage else 8}
    first_stage_split = {"weights": 3, "gradients": 2, "optimizer": 1}
    state = {}
    for name, size in per_parameter.items():
        processes = world_size if zero_stage >= first_stage_split[name] else 1
        in_host_memory = offload and (name != "weights" or zero_stage == 3)
        state[name] = 0 if in_host_memory else -(-size * parameters // processes)
    return state


def memory_table(
    parameters: int, mixed_precision: str, world_sizes: Sequence[int] = (1, 8, 64)
) -> str:
    """`model_state_bytes` as a Markdown table: ZeRO stages down, numbers of GPUs across."""
    unit, size = ("GiB", 2**30) if parameters >= 2**26 else ("MiB", 2**20)
    header = [f"{world} GPU{'s' if world > 1 else ''}" for world in world_sizes]
    rows = [["ZeRO stage", *header], ["---"] * (1 + len(header))]
    for stage in (0, 1, 2, 3):
        row = ["0 (DDP)" if stage == 0 else str(stage)]
        for world_size in world_sizes:
            state = model_state_bytes(parameters, stage, world_size, mixed_precision)
            parts = " + ".join(f"{value / size:.1f}" for value in state.values())
            row.append(f"{parts} = {sum(state.values()) / size:.1f} {unit}")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plan(
    config: Any,
    arguments: Any,
    phases: Sequence[tuple[int, int | None]],
    auto_model: Any = AutoModelForCausalLM,
    predicted: float = 1.0,
) -> str:
    """What `--dry_run true` prints: parameters, tokens, steps, FLOPs, memory by ZeRO stage.

    Args:
        arguments: a `TrainingArguments`.
        phases: (sequence length, steps) one after the other; None: no end is set.
        predicted: as for `flops_per_token`.
    """
    counts, batch = parameter_count(config, auto_model), arguments.global_batch_size
    lines = [
        f"model        {config.model_type}, {counts['total']:,} parameters "
        f"({counts['without_input_embeddings']:,} without the input embeddings)",
    ]
    total = 0.0
    for length, steps in phases:
        flops = flops_per_token(config, length, auto_model, predicted)
        lines.append(
            f"step         {batch:,} sequences x {length:,} = {batch * length:,} tokens, "
            f"{flops:,} FLOPs a token (6 N + 12 L H S)"
        )
        if steps is not None:
            tokens = steps * batch * length
            total += tokens * flops
            lines.append(f"run          {steps:,} steps = {tokens:,} tokens")
    if total:
        days = total / (0.4 * 989e12 * 86400)
        lines.append(f"compute      {total:.3g} FLOPs: {days:,.4g} H100 days at 40% MFU")
    lines += [
        "",
        f"memory of weights + gradients + optimizer per GPU (mixed_precision: "
        f"{arguments.mixed_precision}), activations not counted:",
        "",
        memory_table(counts["total"], arguments.mixed_precision),
    ]
    return "\n".join(lines)


# NF4 with its scales quantized too (Dettmers et al. 2023, QLoRA): 4 bits, for each 64 weights
# 8 bits of scale, and for each 256 scales 32 bits
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Adam's two moments: 8 bits each, and for each 256 of them a scale of 32 bits
MOMENTS_8BIT_BYTES = 2 * (1 + 4 / 256)


def parameter_parts(
    config: Any, arguments: AdapterArguments, auto_model: Any = AutoModelForCausalLM
) -> dict[str, int]:
    """Numbers of parameters: "trained", and of them the "embeddings"; "frozen"; "quantizable",
    those that 4-bit loading takes: of the linear layers but the head. The model is built without
    storage.
    """
    linear = empty_model(config, auto_model).base_model.modules()
    linear = sum(m.weight.numel() for m in linear if isinstance(m, torch.nn.Linear))
    # an adapter stands inside of the model
    model = check_trained_part(config, arguments, auto_model, "CAUSAL_LM")
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    embeddings = (m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding))
    return {
        "trained": trained,
        "embeddings": sum(weight.numel() for weight in embeddings if weight.requires_grad),
        "frozen": sum(p.numel() for p in parameters) - trained,
        "quantizable": linear,
    }


def finetuning_bytes(
    parts: dict[str, int],
    zero_stage: int,
    world_size: int,
    mixed_precision: str,
    half_frozen: bool,
    load_in_4bit: bool = False,
    optim: str = "adamw_torch_fused",
) -> dict[str, int]:
    """Bytes on each GPU that are held from step to step; activations are not counted.

    Args:
        parts: as `parameter_parts` gives them.
        zero_stage: 0 (DistributedDataParallel) to 3.
        half_frozen: whether frozen weights are kept in 16 bits under stage 0.
        optim: "adamw_bnb_8bit" goes with stage 0.

    Returns:
        "frozen", "weights" (trained), "gradients", "optimizer" (AdamW, and fp32 copies).
    """
    is_half = mixed_precision != "no"
    trained_width = 2 if zero_stage and is_half else 4
    frozen_width = 2 if is_half and (zero_stage or half_frozen) else 4
    frozen = parts["frozen"] * frozen_width
    if load_in_4bit:
        frozen -= round(parts["quantizable"] * (frozen_width - NF4_BYTES))
    optimizer = parts["trained"] * (12 if zero_stage else 8)
    if optim == "adamw_bnb_8bit":
        optimizer -= round((parts["trained"] - parts["embeddings"]) * (8 - MOMENTS_8BIT_BYTES))
    sizes = {
        "frozen": (frozen, 3),
        "weights": (parts["trained"] * trained_width, 3),
        "gradients": (parts["trained"] * trained_width, 2),
        "optimizer": (optimizer, 1),
    }
    return {
        name: -(-size // (world_size if zero_stage >= first_split else 1))
        for name, (size, first_split) in sizes.items()
    }


def finetuning_plan(config: Any, arguments: Any, load_in_4bit: bool = False) -> str:
    """What `--dry_run true` prints: parameters, and memory by ZeRO stage and number of GPUs."""
    a, parts = arguments, parameter_parts(config, arguments)
    total = parts["trained"] + parts["frozen"]
    lines = [
        f"model        {config.model_type}, {total:,} parameters, of which "
        f"{parts['trained']:,} are trained ({parts['trained'] / total:.2%})",
        f"step         {a.global_batch_size:,} examples of at most {a.sequence_length:,} tokens",
        f"micro-batch  at most {a.per_device_batch_size * a.sequence_length:,} tokens",
    ]
    tokens = a.per_device_batch_size * a.sequence_length
    text = config.get_text_config()
    if a.gradient_checkpointing:
        kept = text.num_hidden_layers * tokens * text.hidden_size
        kept *= 4 if a.mixed_precision == "no" else 2
        lines.append(
            f"activations  {kept / 2**30:.1f} GiB kept between layers, and one layer's own"
        )
    lines += [
        "",
        "memory of frozen weights + weights + gradients + optimizer per GPU (mixed_precision: "
        f"{a.mixed_precision}), activations not counted:",
        "",
        "| ZeRO stage | 1 GPU | 8 GPUs |",
        "| --- | --- | --- |",
    ]
    for stage in (0, 1, 2, 3):
        cells = ["0 (DDP)" if stage == 0 else str(stage)]
        for world_size in (1, 8):
            if stage == 3 and load_in_4bit:
                cells.append("not with load_in_4bit")
                continue
            if stage and a.optim == "adamw_bnb_8bit":
                cells.append("not with adamw_bnb_8bit")
                continue
            state = finetuning_bytes(
                parts, stage, world_size, a.mixed_precision, a.has_adapter, load_in_4bit, a.optim
            )
            sizes = " + ".join(f"{value / 2**30:.1f}" for value in state.values())
            cells.append(f"{sizes} = {sum(state.values()) / 2**30:.1f} GiB")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
