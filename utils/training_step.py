"""One step of training: the loss of a global batch, however it is split, and the update.

An objective is a module whose `forward(**batch)` returns named sums of losses, and whose
`counts(batch)` tells what each is divided by; `names` lists them. The loss of a step is
Σ weight x sum / count over the whole global batch: however it is split over ranks and
micro-batches, it is the same number, but for dropout and other noise, which is drawn anew for each
micro-batch.
"""

import math
from contextlib import nullcontext

import torch

from utils.engine import Engine
from utils.randomness import random_key


def train_step(
    engine: Engine,
    objective: torch.nn.Module,
    batches: list[dict[str, torch.Tensor]],
    counts: dict[str, int],
    step: int,
    limit: float,
) -> dict[str, float]:
    """Update the weights; returns the losses of the global batch, which every rank sees alike.

    Args:
        batches: the rank's micro-batches of the step.
        counts: by the name of a loss, what its sum over the global batch is divided by.
        step: of the steps before this one, how many: what is random is keyed by it.
        limit: a loss above it is a spike, which `skip_loss_spikes` keeps from the weights.
    """
    a, accelerator = engine.arguments, engine.accelerator
    objective.train()
    engine.begin_step(len(batches))
    sums = torch.zeros(len(counts), device=accelerator.device)
    divisors = torch.tensor([max(n, 1) for n in counts.values()], device=accelerator.device)
    for index, batch in enumerate(batches):
        is_last = index == len(batches) - 1
        torch.manual_seed(random_key(a.seed, step, index, accelerator.process_index))
        with nullcontext() if is_last else engine.accumulate():
            with accelerator.autocast():
                terms = engine.module(**{k: v.to(accelerator.device) for k, v in batch.items()})
            terms = torch.stack([terms[name].float() for name in counts])
            sums += terms.detach()
            loss = (terms / divisors).sum()
            if is_last:
                means = accelerator.reduce(sums, "sum") / divisors
                allowed = limit if a.skip_loss_spikes else math.inf
                good = means.sum().isfinite() & (means.sum() <= allowed)
                # every rank sees the same loss; a bad one makes the gradients non-finite, which
                # the engine skips: no rank waits for the accelerator to decide
                loss = loss * torch.where(good, 1.0, math.nan)
            # the engine takes the mean over the ranks, where the sum is wanted
            engine.backward(loss * accelerator.num_processes, is_last)
        engine.step(is_last)
    return dict(zip(counts, means.tolist(), strict=True))
