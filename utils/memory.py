"""What a training run will need, known from the model's config alone: nothing is loaded.

`--dry_run true` prints it, and the table of ds_configs/README.md is `memory_table` of a 7B model.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from utils.config import InputError
from utils.encoders import PAIR_HEADS

PAIR_MODULES = {"pooler", *PAIR_HEADS}


def empty_model(config: Any, auto_model: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The language model that a transformers config describes, built without storage.

    Args:
        auto_model: AutoModelForCausalLM or another class of its kind.

    Raises:
        InputError: transformers has no such language model for this config.
    """
    models = auto_model._model_mapping
    if type(config) not in models:
        kind = auto_model.__name__.removeprefix("AutoModelFor")
        raise InputError(f"transformers has no model for {kind} of type {config.model_type!r}")
    # not `from_config`: it would split the weights over the processes where ZeRO-3 is set up
    with torch.device("meta"):
        return models[type(config)](config)


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
