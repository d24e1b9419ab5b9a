"""What a model says of every example of a set, whatever the number of ranks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from utils.evaluation import batches_of
from utils.training import Training


def predict(
    training: Training,
    examples: list[dict[str, Any]],
    to_batch: Callable[[list[list[dict[str, Any]]]], dict[str, torch.Tensor]],
) -> np.ndarray | None:
    """What `objective(**batch, predict=True)` returns of each example, in their order.

    All ranks call it together and get the same: (examples, …). None when a stop signal came.

    Args:
        examples: each with its input_ids.
        to_batch: rows of one example or none → the batch.
    """
    a, ranks, device = training.arguments, training.ranks, training.accelerator.device
    lengths = [len(example["input_ids"]) for example in examples]
    found: list[tuple[int, np.ndarray]] = []
    training.objective.eval()
    for indices in batches_of(ranks, lengths, a.per_device_batch_size * a.sequence_length):
        batch = to_batch([[examples[index]] for index in indices] or [[]])
        with torch.no_grad(), training.accelerator.autocast():
            values = training.engine.module(
                **{name: tensor.to(device) for name, tensor in batch.items()}, predict=True
            )
        found += zip(indices, values.float().cpu().numpy(), strict=False)
    if ranks.stopped:
        return None
    return np.stack([value for _, value in sorted(ranks.gather(found), key=lambda item: item[0])])
