"""What a model says of every example of a set, whatever the number of ranks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from utils.scoring import score_examples
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
    a = training.arguments

    def values_of(indices: list[int]) -> np.ndarray:
        batch = to_batch([[examples[index]] for index in indices] or [[]])
        return training.forward(batch, predict=True).float().cpu().numpy()

    lengths = [len(example["input_ids"]) for example in examples]
    budget = a.per_device_batch_size * a.sequence_length
    found = score_examples(training, lengths, budget, values_of, "predicting")
    return None if found is None else np.stack(found)
