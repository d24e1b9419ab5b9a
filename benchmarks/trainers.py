"""What the benchmarks of training share: transformers.Trainer and its kind beside a recipe."""

import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from utils.training import Training

# step, useful tokens so far (not padding); also before the first step, with 0, 0
Observer = Callable[[int, int], None]


def observe_recipe(training: Training, steps: int, observe: Observer) -> None:
    """Train a prepared run for some steps; nothing is saved."""
    training.ranks.signals.close()  # there is nothing to save when a signal comes
    observe(0, 0)
    for step in training.steps():
        observe(step, training.state.tokens)
        if step == steps:
            break


def tokens_of(trainer: Trainer, inputs: dict[str, Any]) -> int:
    """What a trainer has seen with this batch: more than before by what is no padding."""
    mask = inputs.get("attention_mask")
    count = inputs["input_ids"].numel() if mask is None else mask.sum()
    return trainer.counted.useful + int(count)


def observed(
    trainer: type[Trainer],
    observe: Observer,
    count: Callable[[Trainer, Any], int] = tokens_of,
) -> type[Trainer]:
    """The trainer's class, made to count what it trains on.

    Args:
        count: trainer, batch → useful tokens so far, asked after each batch.
    """

    class Observed(TrainerCallback):
        def __init__(self):
            self.useful = 0

        def on_train_begin(self, arguments, state, control, **kwargs):
            observe(0, 0)

        def on_step_end(self, arguments, state, control, **kwargs):
            observe(state.global_step, self.useful)

    class ObservedTrainer(trainer):
        def __init__(self, *args: Any, **options: Any):
            self.counted = Observed()
            super().__init__(*args, callbacks=[self.counted], **options)

        def training_step(self, model, inputs, *rest):
            loss = super().training_step(model, inputs, *rest)
            self.counted.useful = count(self, inputs)
            return loss

    return ObservedTrainer


def trainer_settings(args: Any, steps: int) -> dict[str, Any]:
    """A recipe's settings as `transformers.TrainingArguments` takes them; nothing is written."""
    return {
        "seed": args.seed,
        "max_steps": steps,
        "per_device_train_batch_size": args.per_device_batch_size,
        "gradient_accumulation_steps": args.global_batch_size // args.per_device_batch_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": args.lr_scheduler_type,
        "optim": "adamw_torch_fused",
        "weight_decay": args.weight_decay,
        "adam_beta1": args.adam_beta1,
        "adam_beta2": args.adam_beta2,
        "adam_epsilon": args.adam_epsilon,
        "max_grad_norm": args.max_grad_norm,
        "use_cpu": not torch.cuda.is_available(),
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def timed(train: Callable[[Observer], None], first: int, last: int) -> dict[str, float]:
    """Seconds and useful tokens from the end of step `first` to that of step `last`."""
    marks = {}

    def observe(step: int, tokens: int) -> None:
        marks[step] = time.perf_counter(), tokens

    train(observe)
    seconds, tokens = (b - a for a, b in zip(marks[first], marks[last], strict=True))
    return {"seconds": seconds, "tokens": tokens}


def by_turns(
    peers: Iterable[str], turns: int, measure: Callable[[str, int], dict[str, float]]
) -> tuple[dict[str, list[dict[str, float]]], dict[str, list[float]]]:
    """(what was measured, useful tokens/s) of each peer, turn after turn.

    Args:
        measure: peer, seed → as `timed` gives it.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
    rates: dict[str, list[float]] = {name: [] for name in found}
    for seed in range(turns):
        for name in found:
            found[name].append(measure(name, seed))
            rates[name].append(found[name][-1]["tokens"] / found[name][-1]["seconds"])
            print(f"turn {seed + 1}: {name}: {rates[name][-1]:,.0f} useful tokens/s", flush=True)
    return found, rates


def in_a_fresh_process(function: Callable, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(function, *arguments).result()


def peak_memory(train: Callable[[Observer], Any], steps: int) -> int:
    """Bytes at the peak of the first steps, less those that were in use before them.

    On a CPU it is the resident memory of the process (VmHWM of Linux, set back before the first
    step; `ru_maxrss` would begin with what imports and data took at their worst).
    """
    found = {}

    def observe(step: int, tokens: int) -> None:
        if step == 0:
            reset_peak()
        if step in (0, steps):
            found[step] = peak_bytes()

    train(observe)
    return found[steps] - found[0]


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
