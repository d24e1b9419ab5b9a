"""Cross-entropy of a vocabulary projection without ever holding the logits.

Only a chunk of rows of the logits exists at a time, and its gradient is taken while it does: the
memory is that of one chunk, the arithmetic that of the plain loss (Hsu et al. 2024, Liger Kernel,
describe the same scheme; Wijmans et al. 2024 the memory it saves).
"""

import torch
from torch.nn.functional import cross_entropy, linear

from utils.loss import IGNORE_INDEX

CHUNK_ELEMENTS = 2**24  # of logits: 64 MB in fp32


def summed_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> torch.Tensor:
    """Σ cross_entropy(logits, labels), in fp32; labels of -100 add nothing.

    The logits are hidden @ weight.T + bias, then as `changed_logits` changes them.

    Args:
        hidden: (…, hidden size).
        weight: (vocabulary, hidden size).
        labels: (…), the token to be predicted at each position.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    return _SummedCrossEntropy.apply(hidden, weight, bias, labels, scale, cap)


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
        rows = _chunk_rows(weight, cap)
        losses, are_right = [], []
        for h, y in zip(flat.split(rows), labels.reshape(-1).split(rows), strict=True):
            logits = linear(h, weight.to(h.dtype), bias).float()
            logits = changed_logits(logits, scale, cap)
            losses.append(cross_entropy(logits, y, ignore_index=IGNORE_INDEX, reduction="none"))
            are_right.append(logits.argmax(1) == y)
        return torch.cat(losses).view(labels.shape), torch.cat(are_right).view(labels.shape)


def changed_logits(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """The logits times `scale`, then cap x tanh(logits / cap) (Gemma Team 2024); in place."""
    if scale != 1:
        logits *= scale
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, cap):
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]  # a frozen head needs none
        rows = _chunk_rows(weight, cap)
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if of_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None
        projection = weight.to(hidden.dtype)
        for start in range(0, hidden.shape[0], rows):
            chunk, target = hidden[start : start + rows], labels[start : start + rows]
            logits = changed_logits(linear(chunk, projection, bias).float(), scale, cap)
            slope = None if cap is None else (logits / cap).square_().neg_().add_(1)  # tanh's
            counted = (target != IGNORE_INDEX).unsqueeze(1)
            index = target.clamp(min=0).unsqueeze(1)
            normalizer = logits.logsumexp(1, keepdim=True)
            total += ((normalizer - logits.gather(1, index)) * counted).sum()
            if of_hidden or of_weight or of_bias:
                # d loss / d logits = softmax - one hot, nothing where the label is ignored
                gradient = logits.sub_(normalizer).exp_().mul_(counted)
                gradient.scatter_add_(1, index, -counted.float())
                if slope is not None:
                    gradient *= slope
                if scale != 1:
                    gradient *= scale
                low = gradient.to(hidden.dtype)
                if of_hidden:
                    hidden_grad[start : start + rows] = low @ projection
                if of_weight:
                    weight_grad += low.T @ chunk
                if of_bias:
                    bias_grad += gradient.sum(0)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, weight_of_loss):
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else (hidden_grad * weight_of_loss).to(hidden_grad.dtype),
            None if weight_grad is None else (weight_grad * weight_of_loss).to(ctx.dtype),
            None if bias_grad is None else (bias_grad * weight_of_loss).to(ctx.dtype),
            *(None, None, None),
        )


def _chunk_rows(weight: torch.Tensor, cap: float | None) -> int:
    elements = CHUNK_ELEMENTS if cap is None else CHUNK_ELEMENTS // 2  # and the slope of the cap
    return max(1, elements // weight.shape[0])
