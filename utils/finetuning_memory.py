"""What fine-tuning needs on each GPU where a part of the model, or an adapter, is trained.

`--dry_run true` prints it: known from the configuration alone, nothing is loaded.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from utils.adapters import AdapterArguments, check_trained_part
from utils.memory import empty_model

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
