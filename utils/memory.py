"""What a training run will need, known from the model's config alone: nothing is loaded.

`--dry_run` prints it, and the table of ds_configs/README.md is `memory_table` of a 7B model.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from utils.model import empty_model
from utils.report import markdown_table

PAIR_HEADS = {"seq_relationship", "sop_classifier"}
PAIR_MODULES = {"pooler", *PAIR_HEADS}
# NF4 with its scales quantized too (Dettmers et al. 2023, QLoRA): 4 bits, for each 64 weights
# 8 bits of scale, and for each 256 scales 32 bits
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Adam's two moments: 8 bits each, and for each 256 of them a scale of 32 bits
MOMENTS_8BIT_BYTES = 2 * (1 + 4 / 256)


def parameter_count(config: Any, auto_model: Any = None) -> dict[str, int]:
    """The parameters of an `empty_model`: exact for every architecture; tied weights count once.

    Returns:
        "total"; "embeddings", of tokens, positions and types, the tied ones too;
        "without_input_embeddings": less every embedding that is only looked up, by token
        or by position (a matrix tied to the output projection multiplies there, and stays);
        "head": of these, what comes after the base model, to the matrix of the logits;
        "pair_head": of these, what only the first token of a pair of segments goes through (BERT's
        pooler and its classifier); "computed_again": where layers share their weights (ALBERT),
        what each use after the first would add.
    """
    model = empty_model(config, auto_model)
    output = model.get_output_embeddings()
    embeddings = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    lookups = embeddings - (set() if output is None else {output.weight})
    parameters = dict(model.named_parameters())
    pair_head = {w for name, w in parameters.items() if {*name.split(".")} & PAIR_MODULES}
    head = {*parameters.values()} - {*model.base_model.parameters()} - pair_head
    head |= set() if output is None else {output.weight}  # may be tied to the base model
    total = count_parameters(parameters.values())
    return {
        "total": total,
        "embeddings": count_parameters(embeddings),
        "without_input_embeddings": total - count_parameters(lookups),
        "head": count_parameters(head),
        "pair_head": count_parameters(pair_head),
        "computed_again": _computed_again(model),
    }


def count_parameters(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _computed_again(model: torch.nn.Module) -> int:
    groups = getattr(model.config, "num_hidden_groups", None)
    if not groups:
        return 0
    shared = (p for name, p in model.named_parameters() if "layer_groups" in name)
    uses = model.config.num_hidden_layers / groups
    return round((uses - 1) * count_parameters(shared))


def flops_per_token(
    config: Any, sequence_length: int, auto_model: Any = None, predicted: float = 1.0
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
    width = getattr(text, "num_hidden_layers", 0) * getattr(text, "hidden_size", 0)  # not BLT's
    attention = 12 * width * sequence_length
    return 6 * parameters + attention


def state_bytes(
    parts: dict[str, int],
    zero_stage: int,
    world_size: int,
    mixed_precision: str,
    *,
    offload: bool = False,
    half_frozen: bool = False,
    load_in_4bit: bool = False,
    optim: str = "adamw_torch_fused",
) -> dict[str, int]:
    """Bytes on each GPU that training with AdamW holds from step to step.

    After ZeRO (Rajbhandari et al. 2020, section 3.1), as DeepSpeed 0.19 keeps them. Bytes for a
    trained parameter, before ZeRO splits them over the processes (stage 1 the optimizer, stage 2
    the gradients too, stage 3 all three, and what is frozen):

                             weights  gradients  optimizer
        ZeRO, fp32              4         4      4 + 8 (a second copy of the weights, moments)
        ZeRO, bf16 or fp16      2         2      4 + 8 (fp32 master weights, moments)
        stage 0, any            4         4          8 (autocast keeps the weights in fp32)

    Gradients accumulate in the precision of the weights, unless the DeepSpeed config sets
    `data_types.grad_accum_dtype`. Not counted: activations, communication buckets, and the fp32
    copy of its gradients that a process makes while it steps.

    Args:
        parts: numbers of parameters: "trained", and of them "embeddings", which 8-bit moments leave
            out; where a part is frozen also "frozen", and of it "quantizable".
        zero_stage: 0 (DistributedDataParallel) to 3.
        mixed_precision: "no", "bf16" or "fp16".
        offload: as in ds_configs/zero2_offload.json and zero3_offload.json: gradients and
            optimizer are in the host's memory, under stage 3 the weights too.
        half_frozen: whether frozen weights are kept in 16 bits under stage 0.
        optim: "adamw_bnb_8bit" goes with stage 0.

    Returns:
        "frozen" (where `parts` has it), "weights" (trained), "gradients" and "optimizer".
    """
    if zero_stage not in (0, 1, 2, 3) or mixed_precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"no such setting: {zero_stage=}, {mixed_precision=}")
    trained, is_half = parts["trained"], mixed_precision != "no"
    width = 2 if zero_stage and is_half else 4
    optimizer = trained * (12 if zero_stage else 8)
    if optim == "adamw_bnb_8bit":
        optimizer -= round((trained - parts["embeddings"]) * (8 - MOMENTS_8BIT_BYTES))
    # what: bytes, and the first stage that splits them
    sizes = {"weights": (trained * width, 3), "gradients": (trained * width, 2)}
    sizes["optimizer"] = (optimizer, 1)
    if "frozen" in parts:
        width = 2 if is_half and (zero_stage or half_frozen) else 4
        quantized = round(parts["quantizable"] * (width - NF4_BYTES)) if load_in_4bit else 0
        sizes = {"frozen": (parts["frozen"] * width - quantized, 3), **sizes}
    state = {}
    for name, (size, first_split) in sizes.items():
        in_host_memory = offload and (first_split < 3 or zero_stage == 3)
        processes = world_size if zero_stage >= first_split else 1
        state[name] = 0 if in_host_memory else -(-size // processes)
    return state


def memory_table(
    parts: dict[str, int],
    mixed_precision: str,
    world_sizes: Sequence[int] = (1, 8, 64),
    **settings: Any,
) -> str:
    """`state_bytes` (whose settings it takes) as a Markdown table: ZeRO stages by GPUs."""
    is_large = "frozen" in parts or parts["trained"] >= 2**26
    unit, size = ("GiB", 2**30) if is_large else ("MiB", 2**20)
    rows = []
    for stage in (0, 1, 2, 3):
        row = ["0 (DDP)" if stage == 0 else str(stage)]
        for world_size in world_sizes:
            state = state_bytes(parts, stage, world_size, mixed_precision, **settings).values()
            sizes = " + ".join(f"{value / size:.1f}" for value in state)
            row.append(f"{sizes} = {sum(state) / size:.1f} {unit}")
        if stage == 3 and settings.get("load_in_4bit"):
            row[1:] = ["not with load_in_4bit"] * len(world_sizes)
        elif stage and settings.get("optim") == "adamw_bnb_8bit":
            row[1:] = ["not with adamw_bnb_8bit"] * len(world_sizes)
        rows.append(row)
    header = [f"{world} GPU{'s' if world > 1 else ''}" for world in world_sizes]
    return markdown_table(["ZeRO stage", *header], rows)


def plan(
    config: Any,
    arguments: Any,
    phases: Sequence[tuple[int, int | None]] = (),
    auto_model: Any = None,
    predicted: float = 1.0,
) -> str:
    """What `--dry_run` prints: parameters, tokens, steps, FLOPs, memory by ZeRO stage.

    Args:
        arguments: a `TrainingArguments`.
        phases: (sequence length, steps) one after the other; none: all steps are alike.
        predicted: as for `flops_per_token`.
    """
    counts, batch = parameter_count(config, auto_model), arguments.global_batch_size
    lines = [
        f"model        {config.model_type}, {counts['total']:,} parameters "
        f"({counts['without_input_embeddings']:,} without the input embeddings)"
    ]
    total = 0.0
    for length, steps in phases or [(arguments.row_length, arguments.total_steps)]:
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
    parts = {"trained": counts["total"], "embeddings": counts["embeddings"]}
    lines += memory_section(parts, arguments.mixed_precision, optim=arguments.optim)
    return "\n".join(lines)


def distillation_plan(
    config: Any, of_teacher: Any, arguments: Any, auto_model: Any = None, **more: Any
) -> str:
    """The student's `plan`, and what its teacher weighs on each process."""
    bits = {"8bit": 8, "4bit": 4, "float32": 32, "bfloat16": 16, "float16": 16}
    auto = 32 if arguments.mixed_precision == "no" else 16
    count = parameter_count(of_teacher, auto_model)["total"]
    size = count * bits.get(arguments.teacher.dtype, auto) / 8 / 2**30
    weighs = (
        f"teacher      {count:,} parameters, about {size:.1f} GiB beside it; under ZeRO-3 split"
    )
    return f"{plan(config, arguments, auto_model=auto_model, **more)}\n\n{weighs}"


def memory_section(parts: dict[str, int], mixed_precision: str, **settings: Any) -> list[str]:
    """The lines of a plan about `memory_table`, which takes the same."""
    held = ["frozen weights"] * ("frozen" in parts) + ["weights", "gradients", "optimizer"]
    heading = (
        f"memory of {' + '.join(held)} per GPU (mixed_precision: {mixed_precision}), "
        "activations not counted:"
    )
    return ["", heading, "", memory_table(parts, mixed_precision, **settings)]
