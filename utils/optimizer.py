"""AdamW over the parameters that are trained, in groups: by decay, and by learning rate (LoRA+)."""

from typing import Any

import torch

from utils.arguments import TrainingArguments
from utils.initialisation import mup_scales


def adamw(model: torch.nn.Module, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """Matrices and embeddings decay; norms and biases do not.

    A group's `lr_ratio` says how many times faster than the schedule it learns: with
    `loraplus_lr_ratio` LoRA's B learns that much faster than A (Hayou et al. 2024, LoRA+), with
    `mup_base_width` matrices as they have to in a model of another width (see `mup_scales`); their
    decay a step, learning rate x weight_decay, stays as it is.

    `optim: adamw_bnb_8bit`: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization.

    `l1_decay`: after an update each weight that decays moves towards 0 by learning rate x l1_decay,
    and stays there: the proximal step of an L1 penalty, decoupled from Adam's moments as AdamW's
    decay is (Loshchilov & Hutter 2019; Parikh & Boyd 2014, 6.5.2).
    """
    a, loraplus_lr_ratio = arguments, getattr(arguments, "loraplus_lr_ratio", None)
    base_width = getattr(arguments, "mup_base_width", None)
    scales = mup_scales(model, base_width) if base_width else {}
    found: dict[tuple[bool, float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # ZeRO-3 leaves an empty tensor in the place of a parameter and its shape beside it
            is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
            is_fast = loraplus_lr_ratio is not None and ".lora_B." in name
            of_width = scales[name].learning_rate if name in scales else 1.0
            key = (not is_matrix, loraplus_lr_ratio if is_fast else 1.0, of_width)
            found.setdefault(key, []).append(parameter)
    groups = [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_vector else a.weight_decay / of_width,
            "lr_ratio": of_adapter * of_width,
            "l1_decay": 0.0 if is_vector else a.l1_decay,
        }
        for (is_vector, of_adapter, of_width), parameters in sorted(found.items())
    ]
    settings = {"lr": a.learning_rate, "betas": (a.adam_beta1, a.adam_beta2), "eps": a.adam_epsilon}
    if a.optim == "adamw_bnb_8bit":
        optimizer = _adamw_8bit(model, groups, settings)
    else:
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    if a.l1_decay:
        optimizer.register_step_post_hook(_shrink)
    return optimizer


def _adamw_8bit(model: torch.nn.Module, groups: list[dict], settings: dict[str, Any]) -> Any:
    import bitsandbytes

    overrides = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):  # a token's gradient is rare and large
            overrides.register_module_override(module, "weight", {"optim_bits": 32})
    return bitsandbytes.optim.AdamW8bit(groups, **settings)


def _shrink(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            threshold = group["lr"] * group["l1_decay"]
            for parameter in group["params"] if threshold else ():
                parameter.copy_(torch.nn.functional.softshrink(parameter, threshold))
