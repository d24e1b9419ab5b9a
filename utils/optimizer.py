"""How weights move: the optimizer and its groups, the schedule of its learning rate, and settings.

docs/optimizers.md says which to take, and what each can resume.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers

from utils.config import InputError, Settings
from utils.initialisation import mup_scales
from utils.randomness import random_key
from utils.ranks import launched_with, launched_world_size, launched_zero_stage

SchedulerType = Literal[
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "constant",
    "constant_with_warmup",
]
# usual learning rates, by that of AdamW: Lion's is 3 to 10 times less (Chen et al. 2023), that of
# Adafactor is relative to the weights (Shazeer & Stern 2018)
RATE_RATIOS = {"lion_32bit": 0.3, "adafactor": 30.0, "sgd": 300.0}
# ZeRO flattens parameters and cuts them anywhere
BY_ELEMENT = ("adamw_torch_fused", "lion_32bit", "sgd")
WHY_WHOLE = {
    "adamw_bnb_8bit": "keeps the moments of whole matrices",
    "adafactor": "keeps the means of whole rows and columns",
    "muon": "orthogonalizes whole matrices",
    "adamw_bf16": "keeps no fp32 weights, which ZeRO does",
}
ENDLESS_STEPS = 2**20  # of a schedule that time alone moves


@dataclass
class OptimizerArguments(Settings):
    """How weights move; named as in transformers.TrainingArguments."""

    # AdamW; its moments in 8 bits, those of embeddings in 32; weights and moments in bf16, rounded
    # stochastically; Muon for the matrices of the blocks and AdamW for the rest; others
    optim: Literal[
        "adamw_torch_fused",
        "adamw_bnb_8bit",
        "adamw_bf16",
        "muon",
        "adafactor",
        "lion_32bit",
        "sgd",
    ] = "adamw_torch_fused"
    # the peak; null: 3e-4 on raw text and from scratch, to fine-tune 2e-5, of an adapter 2e-4; of
    # that 0.3 times for lion_32bit, 30 for adafactor, 300 for sgd
    learning_rate: float | None = None
    lr_scheduler_type: SchedulerType = "cosine"
    # as transformers.get_scheduler takes them, for example {min_lr_rate: 0.1}, {num_decay_steps: 9}
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    weight_decay: float = 0.1  # L2, decoupled (not for sgd): of matrices, not of norms and biases
    l1_decay: float = 0.0  # of the same, L1: w moves to 0 by learning_rate x l1_decay a step
    adam_beta1: float = 0.9  # of Lion too; the momentum of sgd
    adam_beta2: float = 0.95  # of Lion too
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = self.usual_learning_rate

    def check(self) -> None:
        if self.l1_decay < 0:
            raise InputError(f"l1_decay must not be negative, not {self.l1_decay}")
        stage, is_fsdp = launched_zero_stage(), launched_with("FSDP")
        if problem := refusal(self.optim, stage, is_fsdp, launched_world_size()):
            raise InputError(f"optim: {problem}")
        if self.optim == "adamw_bf16" and self.mixed_precision != "bf16":
            raise InputError("optim: adamw_bf16 needs mixed_precision: bf16")
        kind = self.lr_scheduler_type
        by_time = self.max_hours is not None and kind != "warmup_stable_decay"
        if not (self.has_length or by_time or kind.startswith("constant")):
            more = "" if kind == "warmup_stable_decay" else ", max_hours"
            raise InputError(
                f"lr_scheduler_type: {kind} needs max_steps, max_tokens{more} or num_train_epochs"
            )
        self.check_warmup(self.total_steps)
        super().check()

    def check_warmup(self, total_steps: int | None) -> None:
        if total_steps is not None and self.warmup_steps > total_steps:
            raise InputError(
                f"warmup_steps: {self.warmup_steps} is more than the run's {total_steps} steps"
            )

    @property
    def adamw_learning_rate(self) -> float:
        """That is usual for such a run with AdamW."""
        return 3e-4

    @property
    def usual_learning_rate(self) -> float:
        return self.adamw_learning_rate * RATE_RATIOS.get(self.optim, 1.0)

    def learning_rate_note(self) -> str:
        """A line, of one that is more than 30 times the usual, or less by as much."""
        ratio = self.learning_rate / (usual := self.usual_learning_rate)
        note = f"learning_rate: {ratio:.3g} times the {usual:g} that is usual for such a run"
        return "" if 1 / 30 <= ratio <= 30 else note

    def learning_rate_factor(self, total_steps: int | None) -> Callable[[int, float], float]:
        """What the peak learning rate is multiplied by in the step after `step` steps.

        The function's second argument is the hours trained so far: after its warmup a schedule is
        as far as the larger of the shares of its steps and of `max_hours`.
        """
        self.check_warmup(total_steps)
        first, last = self.warmup_steps, total_steps
        if self.max_hours is not None and total_steps is None:
            last = first + ENDLESS_STEPS
        try:
            schedule = transformers.get_scheduler(
                self.lr_scheduler_type,
                torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate),
                num_warmup_steps=first,
                num_training_steps=last,
                scheduler_specific_kwargs=self.lr_scheduler_kwargs,
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"lr_scheduler_kwargs: {error}") from None
        factor = schedule.lr_lambdas[0]  # a function of the step: nothing to restore

        def of_step(step: int, hours: float = 0.0) -> float:
            if self.max_hours is None or step < first:
                return factor(step)
            share = min(1.0, hours / self.max_hours)
            if total_steps is None:
                return factor(first + share * ENDLESS_STEPS)
            return factor(max(step, first + share * (last - first)))

        return of_step


def refusal(optim: str, zero_stage: int, is_fsdp: bool, world_size: int) -> str:
    """Why an optimizer does not go with a launch, and what to do; "" if it does."""
    instead = "launch without ZeRO and FSDP (single_gpu.yaml, multi_gpu.yaml), or take "
    if zero_stage and optim not in BY_ELEMENT:
        return f"{optim} {WHY_WHOLE[optim]}: {instead}adamw_torch_fused"
    if is_fsdp and optim != "adamw_torch_fused":
        why = WHY_WHOLE.get(optim, "was not tried with FSDP")
        return f"{optim} {why}: {instead}adamw_torch_fused"
    if optim == "adamw_bf16" and world_size > 1:
        return (
            "adamw_bf16 sums gradients in fp32 in one process alone: launch one "
            "(single_gpu.yaml), or take adamw_torch_fused"
        )
    return ""


def make_optimizer(
    model: torch.nn.Module, arguments: OptimizerArguments, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are trained: matrices and embeddings decay, norms and
    biases do not.

    A group's `lr_ratio` says how many times faster than the schedule it learns: with
    `loraplus_lr_ratio` LoRA's B learns that much faster than A (Hayou et al. 2024, LoRA+), with
    `mup_base_width` matrices as they have to in a model of another width (see `mup_scales`); their
    decay a step, learning rate x weight_decay, stays as it is.

    `optim: adamw_bnb_8bit`: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization.

    `l1_decay`: after an update each weight that decays moves towards 0 by learning rate x l1_decay,
    and stays there: the proximal step of an L1 penalty, decoupled from Adam's moments as AdamW's
    decay is (Loshchilov & Hutter 2019; Parikh & Boyd 2014, 6.5.2).

    Args:
        seed: of stochastic rounding.
    """
    a, optim = arguments, arguments.optim
    groups = _groups(model, a)
    adam = {"lr": a.learning_rate, "betas": (a.adam_beta1, a.adam_beta2), "eps": a.adam_epsilon}
    if optim == "adamw_bnb_8bit":
        optimizer = _adamw_8bit(model, groups, adam)
    elif optim == "adamw_bf16":
        optimizer = AdamWBf16(groups, **adam, seed=seed)
    elif optim == "muon":
        optimizer = Muon(groups, **adam)
    elif optim == "adafactor":
        optimizer = torch.optim.Adafactor(groups, lr=a.learning_rate)
    elif optim == "lion_32bit":
        import bitsandbytes

        optimizer = bitsandbytes.optim.Lion32bit(groups, lr=a.learning_rate, betas=adam["betas"])
    elif optim == "sgd":
        optimizer = torch.optim.SGD(groups, lr=a.learning_rate, momentum=a.adam_beta1)
    else:
        optimizer = torch.optim.AdamW(groups, **adam, fused=True)
    if a.l1_decay:
        optimizer.register_step_post_hook(_shrink)
    return optimizer


def _groups(model: torch.nn.Module, a: OptimizerArguments) -> list[dict[str, Any]]:
    """By what moves them, by decay and by learning rate."""
    loraplus_lr_ratio = getattr(a, "loraplus_lr_ratio", None)
    of_blocks = block_matrices(model) if a.optim == "muon" else set()
    base_width = getattr(a, "mup_base_width", None)
    scales = mup_scales(model, base_width) if base_width else {}
    found: dict[tuple[bool, bool, float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # ZeRO-3 leaves an empty tensor in the place of a parameter and its shape beside it
            is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
            is_fast = loraplus_lr_ratio is not None and ".lora_B." in name
            of_width = scales[name].learning_rate if name in scales else 1.0
            of_adapter = loraplus_lr_ratio if is_fast else 1.0
            key = (name not in of_blocks, not is_matrix, of_adapter, of_width)
            found.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_vector else a.weight_decay / of_width,
            "lr_ratio": of_adapter * of_width,
            "l1_decay": 0.0 if is_vector else a.l1_decay,
            **({"is_of_muon": not is_of_adamw} if a.optim == "muon" else {}),
        }
        for (is_of_adamw, is_vector, of_adapter, of_width), parameters in sorted(found.items())
    ]


def block_matrices(model: torch.nn.Module) -> set[str]:
    """Names of the matrices in a model's layers: not of its embeddings, and not of its heads."""
    modules = model.named_modules()
    lookups = {name for name, module in modules if isinstance(module, torch.nn.Embedding)}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
        and any(part.isdigit() for part in name.split("."))  # of a list of layers
        and name.rpartition(".")[0] not in lookups
    }


class Muon(torch.optim.Optimizer):
    """Muon for the groups that say so, AdamW for the others (Jordan et al. 2024).

    Muon's updates are scaled to AdamW's root mean square (Liu et al. 2025, Muon is Scalable for LLM
    Training): one learning rate and one decay serve both. A matrix is orthogonalized as it is:
    transposed (GPT-2) it is the same, fused (query, key and value in one) it is taken for one.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, **adam: Any):
        mine = [group for group in groups if group["is_of_muon"]]
        rest = [group for group in groups if not group["is_of_muon"]]
        self.parts: dict[bool, torch.optim.Optimizer] = {}
        if mine:
            self.parts[True] = torch.optim.Muon(mine, lr=lr, adjust_lr_fn="match_rms_adamw")
        if rest:
            self.parts[False] = torch.optim.AdamW(rest, lr=lr, **adam, fused=True)
        super().__init__([g for part in self.parts.values() for g in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for is_of_muon, part in self.parts.items():
            part.param_groups = [g for g in self.param_groups if g["is_of_muon"] == is_of_muon]
            part.state = self.state
            part.step()


class AdamWBf16(torch.optim.Optimizer):
    """AdamW whose weights and moments are bf16 and whose gradients are summed in fp32.

    The update is computed in fp32 and rounded up or down with the chances that keep its mean
    (Zamirai et al. 2020, Revisiting BFloat16 Training): to the nearest, updates of less than 1/256
    of a weight would be lost. The bits are drawn by (seed, step, parameter): a resume draws the
    same.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, seed: int = 0, **adam: Any):
        self.seed = seed
        for parameter in (p for group in groups for p in group["params"]):
            parameter.data = parameter.data.bfloat16()
            parameter.grad_dtype = torch.float32
        super().__init__(groups, {"lr": lr, **adam})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        places = ((group, p) for group in self.param_groups for p in group["params"])
        for index, (group, parameter) in enumerate(places):
            if parameter.grad is None:
                continue
            state, (beta1, beta2) = self.state[parameter], group["betas"]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            step, gradient = state["step"], parameter.grad
            mean = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
            square = state["exp_avg_sq"].float().lerp_(gradient.square(), 1 - beta2)
            scale = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
            weight = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
            weight.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1**step))
            draw = torch.Generator(parameter.device)
            draw.manual_seed(random_key(self.seed, step, index, "rounding"))
            for target, value in zip(
                (parameter, state["exp_avg"], state["exp_avg_sq"]),
                (weight, mean, square),
                strict=True,
            ):
                target.copy_(stochastically_rounded(value, draw))


def stochastically_rounded(values: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """float32 → bfloat16, one of the two neighbours, whose mean is the value."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(
        2**16, bits.shape, generator=draw, dtype=torch.int32, device=values.device
    )
    return (bits + noise).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


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
