"""What the launch config asks for beside the recipe's settings: taken, or refused by name."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.config import InputError
from utils.ranks import launched_world_size

DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
BATCH_PARTS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# what DeepSpeed calls them (its Adam is AdamW unless adam_w_mode is false), and the settings
AS_HERE = {
    "Adam": "AdamW",
    "WarmupLR": "constant_with_warmup",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
# sections that change what a step is
OTHERS = ("optimizer", "scheduler", "amp", "elasticity", "curriculum_learning", "data_efficiency")


def launched_with(what: str) -> bool:
    """Whether the launch config asks for DEEPSPEED, FSDP, …"""
    return os.environ.get(f"ACCELERATE_USE_{what}", "").lower() == "true"


def launched_with_fsdp() -> bool:
    return launched_with("FSDP")


def launched_zero_stage() -> int:
    """The ZeRO stage that the launch config asks for; 0: none."""
    if not launched_with("DEEPSPEED"):
        return 0
    if config := _deepspeed_config():
        return config["zero_optimization"]["stage"]
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 0))


def check_launch(arguments: Any) -> None:
    """Raises InputError where the launch asks for another run than the settings do.

    A DeepSpeed JSON that was written for another trainer may name settings, if it names the same.

    Args:
        arguments: a `TrainingArguments`.
    """
    for what in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if launched_with(what):
            raise InputError(f"ACCELERATE_USE_{what}: launch with DDP, DeepSpeed ZeRO or FSDP")
    a, config = arguments, _deepspeed_config()
    found = dict(_flat(config))
    same = {
        "train_batch_size": a.global_batch_size,
        "gradient_clipping": a.max_grad_norm,
        "bf16.enabled": a.mixed_precision == "bf16",
        "fp16.enabled": a.mixed_precision == "fp16",
        "optimizer.type": "AdamW",
        "optimizer.params.lr": a.learning_rate,
        "optimizer.params.betas": [a.adam_beta1, a.adam_beta2],
        "optimizer.params.eps": a.adam_epsilon,
        "optimizer.params.weight_decay": a.weight_decay,
        "optimizer.params.adam_w_mode": True,
        "optimizer.params.torch_adam": True,
        "scheduler.type": a.lr_scheduler_type,
    }
    for name in ("optimizer.type", "scheduler.type"):
        found |= {name: AS_HERE.get(found[name], found[name])} if name in found else {}
    parts = [found.get(name) for name in BATCH_PARTS]
    if found.get("train_batch_size", "auto") == "auto" and {*map(type, parts)} == {int}:
        found["train_batch_size"] = launched_world_size() * math.prod(parts)
    used = {name for name in OTHERS if found.get(f"{name}.enabled", True)}
    for name, value in found.items():
        is_named = name in same or name.partition(".")[0] in used
        if is_named and value not in ("auto", same.get(name)):
            raise InputError(
                f"DeepSpeed config {os.environ[DEEPSPEED_FILE]}: {name} is {value}, and for the "
                f'recipe {same.get(name, "unknown")}: set it to "auto", or leave it out'
            )


def _deepspeed_config() -> dict[str, Any]:
    """The JSON that the launch config names; empty where there is none."""
    file = os.environ.get(DEEPSPEED_FILE, "none")
    if file == "none" or not launched_with("DEEPSPEED"):
        return {}
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        stage = config["zero_optimization"]["stage"]
    except OSError as error:
        raise InputError(f"DeepSpeed config {file}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"DeepSpeed config {file} is not JSON: {error}") from None
    except (TypeError, KeyError):
        stage = None
    if stage not in (1, 2, 3):
        raise InputError(
            f"DeepSpeed config {file}: zero_optimization.stage must be 1, 2 or 3, not {stage}; "
            "without ZeRO launch with multi_gpu.yaml or multi_cpu.yaml"
        )
    return config


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested settings."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
