"""One way to update weights: DeepSpeed ZeRO 1 to 3, DistributedDataParallel or one process."""

import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import transformers

from utils import checkpoint
from utils.config import InputError
from utils.fragments import optimizer_step_count, zero_optimizer
from utils.program import say
from utils.randomness import random_key
from utils.ranks import Ranks, launched_with

# variables of Accelerate in whose place the recipe has settings
EXPORTED = {
    "MIXED_PRECISION": "mixed_precision",
    "GRADIENT_CLIPPING": "max_grad_norm",
    "GRADIENT_ACCUMULATION_STEPS": "global_batch_size",
    "DYNAMO_BACKEND": "torch_compile",
}

if TYPE_CHECKING:
    import accelerate


def start_processes(arguments: Any) -> "accelerate.Accelerator":
    """Join the process group that the launcher prepared, on the CPU where there is nothing else."""
    import accelerate

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # libraries call each other by names that have changed: DeepSpeed torch, peft transformers
    renamed = r"torch\.distributed|transformers|peft"
    warnings.filterwarnings("ignore", category=FutureWarning, module=renamed)
    transformers.utils.logging.disable_progress_bar()  # of reading and writing weights
    on_cpu = not torch.accelerator.is_available()
    use_deepspeed = launched_with("DEEPSPEED")
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it finds that out
    is_fp16_supported = not on_cpu  # Accelerate would train in fp32 without a word
    if on_cpu and use_deepspeed:
        import deepspeed

        is_fp16_supported = deepspeed.get_accelerator().is_fp16_supported()
        # DeepSpeed compiles it at every start, training never calls it, and a kill in the midst of
        # that leaves a lock behind, for which all later starts wait
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if arguments.mixed_precision == "fp16" and not is_fp16_supported:
        raise InputError(
            "mixed_precision: fp16 needs a GPU, or DeepSpeed and a CPU that knows fp16"
        )
    for name, setting in EXPORTED.items():
        value = os.environ.get(f"ACCELERATE_{name}", "").lower()
        if value not in ("", "no", "auto", "1", str(getattr(arguments, setting)).lower()):
            say(f"ACCELERATE_{name}={value} is left aside: {setting} decides")
    # Accelerate counts one process under DeepSpeed on CPU unless it is told the backend
    backend = {"backend": "gloo"} if on_cpu and use_deepspeed else {}
    accelerator = accelerate.Accelerator(
        cpu=on_cpu and not use_deepspeed,
        mixed_precision=arguments.mixed_precision,
        # settings of the recipe, whatever ACCELERATE_… variables are exported
        gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=timedelta(hours=2), **backend)],
    )
    if launched_with("FSDP"):
        _set_up_fsdp(accelerator)
    return accelerator


def _set_up_fsdp(accelerator: "accelerate.Accelerator") -> None:
    """FSDP2 on the CPU too, where Accelerate leaves it out; losses and gradient sums in fp32."""
    import accelerate
    from torch.distributed.fsdp import MixedPrecisionPolicy

    state = accelerator.state
    plugin = getattr(state, "fsdp_plugin", None) or accelerate.FullyShardedDataParallelPlugin()
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    plugin.mixed_precision_policy = MixedPrecisionPolicy(half, reduce_dtype=torch.float32)
    plugin.cpu_ram_efficient_loading = False  # it would copy weights that are tied
    state.fsdp_plugin = plugin
    for part in (state, accelerate.PartialState()):  # where the one is made anew from the other
        part.distributed_type = accelerate.DistributedType.FSDP
    # of losses, which nothing changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def enable_checkpointing(model: torch.nn.Module) -> None:
    """Compute the activations inside of each layer again in the backward pass."""
    # as transformers 5.20 and later call it, and as those before did
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False})


def _blocks(model: torch.nn.Module) -> list[str]:
    """The classes of which FSDP makes units: of those that transformers names, which hold no weight
    that another part holds, too (BERT's embeddings, which are its output layer)."""
    uses = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    tied = {
        type(module).__name__
        for module in model.modules()
        if any(uses[parameter] > 1 for parameter in module.parameters())
    }
    return [name for name in getattr(model, "_no_split_modules", None) or () if name not in tied]


class Step(NamedTuple):
    """What one rank trains on in a step."""

    batches: list[dict[str, torch.Tensor]]  # micro-batches: as many on every rank
    tokens: int  # of text; the rest of the batches is padding
    states: dict[int, dict]  # by lane: where the data go on once the step has been trained on


class Data(Protocol):
    """What is trained on: an order of steps that does not depend on the number of ranks."""

    files: list[str]  # that it is read from

    def fingerprint(self) -> dict[str, Any]:
        """By name, what must not change over the life of a run."""

    def count_steps(self, ranks: Ranks) -> int | None:
        """Of the run, where the settings alone do not say it; None: it has no known end."""

    def steps(self, rank: int, world_size: int, step: int, states: dict) -> Iterator[Step]:
        """The rank's steps after `step` steps, which left the states of its lanes."""


class Update(NamedTuple):
    """What has become of a step; the same on every rank."""

    loss: float  # of the global batch
    losses: dict[str, float]  # what it is made of, by name
    gradient_norm: float  # before clipping
    applied: bool  # whether the weights have changed


class Engine:
    """The prepared objective and its optimizer.

    Args:
        objective: a module that holds the model. Its `forward(**batch)` returns named sums of
            losses, its `counts(batch)` tells what each is divided by; `names` lists them. Its
            `weights`, if it has them, are those of the losses in their sum, by name; else 1.
        arguments: a `TrainingArguments`.
    """

    def __init__(
        self,
        accelerator: "accelerate.Accelerator",
        objective: torch.nn.Module,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        arguments: Any,
    ):
        self.accelerator, self.arguments = accelerator, arguments
        self.objective, self.model = objective, model
        self.loaded: Path | None = None  # the checkpoint that was read last
        self.rows: torch.Tensor | None = None  # token ids of the last micro-batch
        self.deepspeed = accelerator.distributed_type.value == "DEEPSPEED"
        if self.deepspeed:
            self._fill_deepspeed_config()
        if arguments.gradient_checkpointing:
            enable_checkpointing(model)
        if arguments.torch_compile:
            # what objectives call; an adapter is inside of it
            getattr(model, "get_base_model", lambda: model)().base_model.compile()
        # FSDP looks here for the blocks that it splits the model into, and Accelerate for sizes
        objective.config = model.config
        objective._no_split_modules = _blocks(model)
        self.module, self.optimizer = accelerator.prepare(objective, optimizer)
        if accelerator.is_fsdp2:
            # else the root keeps whole weights, which are stale when others are set
            self.module.set_reshard_after_forward(True)
        if self.deepspeed and zero_optimizer(self.optimizer) is None:
            raise InputError(
                "DeepSpeed chose an optimizer that checkpoints do not know: leave grad_accum_dtype "
                "out of its config, or take ZeRO stage 2 or 3"
            )

    @contextmanager
    def whole_root(self) -> Iterator[None]:
        """Around what calls the model itself: FSDP gathers what is in no block with the objective.

        All ranks enter it together.
        """
        if self.accelerator.is_fsdp2:
            self.module.unshard()
        yield
        if self.accelerator.is_fsdp2:
            self.module.reshard()

    def describe(self) -> str:
        """How the weights are spread over the processes, for people."""
        if self.deepspeed:
            return f"DeepSpeed ZeRO-{self.module.zero_optimization_stage()}"
        kind = self.accelerator.distributed_type.value
        names = {"NO": "none", "FSDP": "FSDP2"}
        return names.get(kind, "DistributedDataParallel")

    def train_step(
        self,
        batches: list[dict[str, torch.Tensor]],
        counts: dict[str, int],
        step: int,
        learning_rate: float,
        limit: float,
    ) -> Update:
        """Update the weights by one global batch, however it is split.

        The loss is Σ weight x sum / count over the whole global batch: over whatever ranks and
        micro-batches, it is the same number, but for dropout and other noise, which is drawn anew
        for each micro-batch. Non-finite gradients update nothing, on any rank.

        Args:
            batches: the rank's micro-batches of the step.
            counts: by the name of a loss, what its sum over the global batch is divided by.
            step: of the steps before this one, how many: what is random is keyed by it.
            limit: a loss above it is a spike, which `skip_loss_spikes` keeps from the weights.
        """
        a, accelerator = self.arguments, self.accelerator
        self.objective.train()
        self.loaded = None  # the weights move on from it
        self.rows = batches[-1]["input_ids"] if batches else self.rows
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]
        if self.deepspeed:
            # offloading asks for it: a single micro-batch is not summed up in host memory
            self.module.optimizer.gradient_accumulation_steps = len(batches)
        sums = torch.zeros(len(counts), device=accelerator.device)
        divisors = torch.tensor([max(n, 1) for n in counts.values()], device=accelerator.device)
        weights = getattr(self.objective, "weights", {})
        weights = torch.tensor([weights.get(name, 1.0) for name in counts], device=sums.device)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            torch.manual_seed(random_key(a.seed, step, index, accelerator.process_index))
            with nullcontext() if is_last else accelerator.no_sync(self.module):
                with accelerator.autocast():
                    terms = self.module(**{k: v.to(accelerator.device) for k, v in batch.items()})
                terms = torch.stack([terms[name].float() for name in counts])
                sums += terms.detach()
                loss = (terms * weights / divisors).sum()
                if is_last:
                    means = accelerator.reduce(sums, "sum") / divisors
                    total = (means * weights).sum()
                    allowed = limit if a.skip_loss_spikes else math.inf
                    good = total.isfinite() & (total <= allowed)
                    # every rank sees the same loss; a bad one makes the gradients non-finite, and
                    # the update is skipped: no rank waits for the accelerator to decide
                    loss = loss * torch.where(good, 1.0, math.nan)
                # the mean over the ranks is taken below, where the sum is wanted
                self._backward(loss * accelerator.num_processes, is_last)
            if self.deepspeed:
                self.module.step()  # counts the micro-batch; after the last one it updates
        norm, applied = self._update()
        losses = dict(zip(counts, means.tolist(), strict=True))
        return Update(float(total), losses, norm, applied)

    def _backward(self, loss: torch.Tensor, is_last: bool) -> None:
        if self.deepspeed:
            # the micro-batches of a step are counted here: they may change over a run
            self.module.set_gradient_accumulation_boundary(is_last)
            self.module.backward(loss, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)

    def _update(self) -> tuple[float, bool]:
        """(norm of the gradient, whether it was applied)"""
        if self.deepspeed:
            return float(self.module.get_global_grad_norm()), self.module.was_step_applied()
        limit = self.arguments.max_grad_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.module.parameters(), limit))
        applied = math.isfinite(norm)
        if self.accelerator.scaler is not None:
            self.optimizer.step()  # skips by itself, and the scale follows
            applied = not self.accelerator.optimizer_step_was_skipped
        elif applied:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, applied

    def loss_scaler_state(self) -> dict[str, Any]:
        """The state of fp16's dynamic loss scale, as JSON."""
        if self.deepspeed:
            scaler = vars(self.module.optimizer.loss_scaler)
            return {name: v for name, v in scaler.items() if isinstance(v, bool | int | float)}
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler else {}

    def load(self, folder: Path) -> dict[str, Any]:
        """Weights, optimizer and loss scale from a checkpoint; returns its state."""
        state, self.loaded = checkpoint.read_state(folder), folder
        checkpoint.load(folder, self.model, self.optimizer, state["optimizer_step"])
        scale = state["loss_scaler"]
        if self.deepspeed and "cur_scale" in scale:
            vars(self.module.optimizer.loss_scaler).update(scale)
        elif self.accelerator.scaler is not None and "scale" in scale:
            self.accelerator.scaler.load_state_dict(scale)
        return state

    def save(self, folder: Path, state: dict[str, Any], write_more: Any) -> None:
        state = {
            **state,
            "optimizer_step": optimizer_step_count(self.optimizer),
            "loss_scaler": self.loss_scaler_state(),
        }
        checkpoint.save(folder, self.model, self.optimizer, state, write_more)

    def _fill_deepspeed_config(self) -> None:
        """What the JSON leaves to the recipe ("auto"); its loader is its own."""
        a = self.arguments
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        if config["zero_optimization"]["stage"] == 0:
            raise InputError("DeepSpeed without ZeRO: launch with multi_gpu.yaml or multi_cpu.yaml")
        processes = self.accelerator.num_processes
        config["train_batch_size"] = "auto"
        config["train_micro_batch_size_per_gpu"] = a.per_device_batch_size
        # fine-tuning's micro-batches are not of one size: their number is set step by step
        micro_batches = max(1, a.global_batch_size // (processes * a.per_device_batch_size))
        config["gradient_accumulation_steps"] = micro_batches
        self.accelerator.gradient_accumulation_steps = micro_batches
        config["gradient_clipping"] = a.max_grad_norm
        for section in ("optimizer", "scheduler"):
            config.pop(section, None)  # they name what the recipe does itself
        config.setdefault("zero_force_ds_cpu_optimizer", False)  # offloading takes its AdamW, too
        config["steps_per_print"] = 2**62
        if a.mixed_precision == "bf16":
            # without it ZeRO 1 and 2 put non-finite gradients into the weights
            config.setdefault("bf16", {})["check_grad_overflow"] = True
