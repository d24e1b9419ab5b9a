"""Cross-entropy of a vocabulary projection, without ever holding the logits."""

import torch
from torch.nn.functional import cross_entropy

from utils.divergences import Logits, chunk_rows, summed_losses
from utils.loss import IGNORE_INDEX


def summed_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Σ cross_entropy(logits, labels), in fp32; labels of -100 add nothing.

    The logits are hidden @ weight.T + bias, then as `changed_logits` changes them. What
    `label_smoothing` and `z_loss` add: `summed_losses`.

    Args:
        hidden: (…, hidden size).
        weight: (vocabulary, hidden size).
        labels: (…), the token to be predicted at each position.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    logits, more = Logits(hidden, weight, bias, scale, cap), (label_smoothing, z_loss)
    return summed_losses(logits, labels, None, None, None, 1.0, 1.0, *more)[0]


def token_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, whether the label is the most likely token) of each position; no gradient."""
    with torch.no_grad():
        flat = hidden.reshape(-1, hidden.shape[-1])
        given, rows = Logits(flat, weight, bias, scale, cap), chunk_rows(weight.shape[0], cap)
        losses, are_right = [], []
        for start in range(0, len(flat), rows):
            logits = given.rows(slice(start, start + rows))
            y = labels.reshape(-1)[start : start + rows]
            losses.append(cross_entropy(logits, y, ignore_index=IGNORE_INDEX, reduction="none"))
            are_right.append(logits.argmax(1) == y)
        return torch.cat(losses).view(labels.shape), torch.cat(are_right).view(labels.shape)
