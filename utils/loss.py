"""Cross-entropy of a vocabulary projection without ever holding the logits.

Only a chunk of rows of the logits exists at a time, and its gradient is taken while it does: the
memory is that of one chunk, the arithmetic that of the plain loss (Hsu et al. 2024, Liger Kernel,
describe the same scheme; Wijmans et al. 2024 the memory it saves).
"""

from collections.abc import Callable

import torch
import transformers
from torch.nn.functional import cross_entropy, linear

from utils.config import InputError

IGNORE_INDEX = -100  # a label that is no target
# The change of a loss that shows a leak, beside those that are to change. What is masked adds
# exactly 0; a new model leaks as little as 5e-4.
LEAK = 1e-5
CHUNK_ELEMENTS = 2**24  # of logits: 64 MB in fp32

# settings by which models of transformers change the logits further, and the value that does not
LOGIT_SETTINGS = {
    "final_logit_softcapping": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "lm_head_multiplier": 1,
}


def check_head(model: "transformers.PreTrainedModel") -> None:
    """Raises InputError unless the logits of the model are what the losses here take them for."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or {*model.children()} != {model.base_model, head}:
        raise InputError(
            f"model: {model.config.model_type} has more than a linear head between its hidden "
            "states and the logits: the chunked loss cannot follow"
        )
    for name, neutral in LOGIT_SETTINGS.items():
        value = getattr(model.config, name, None)
        if value not in (None, neutral):
            raise InputError(
                f"model.{name}: {value} changes the logits after the head, which the chunked loss "
                f"does not: set it to {'null' if neutral is None else neutral}"
            )


def check_packing(
    token_losses: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    shape: tuple[int, int],
    vocabulary: int,
) -> None:
    """Raises InputError when a document sees the one before it in the row.

    Not every model of transformers masks its attention by the position ids, though it takes them.

    Args:
        token_losses: input_ids and position_ids → the loss of each position, all of shape (rows,
            sequence_length).
    """
    rows, sequence_length = shape
    middle = sequence_length // 2
    tokens = 7 * torch.arange(rows * sequence_length).view(shape) % vocabulary
    others = tokens.clone()
    others[:, :middle] = (tokens[:, :middle] + vocabulary // 2) % vocabulary
    places = torch.arange(sequence_length)
    places = torch.where(places < middle, places, places - middle).expand(shape)
    before, after = (
        token_losses({"input_ids": x, "position_ids": places}) for x in (tokens, others)
    )
    first, second = (after - before).abs().split([middle, sequence_length - middle], dim=1)
    if middle and second.max() > LEAK * first.max():
        raise InputError(
            "model: documents in one row see each other: it cannot train on packed rows"
        )


def summed_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Σ cross_entropy(hidden @ weight.T + bias, labels), in fp32; labels of -100 add nothing.

    Args:
        hidden: (…, hidden size).
        weight: (vocabulary, hidden size).
        labels: (…), the token to be predicted at each position.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    return _SummedCrossEntropy.apply(hidden, weight, bias, labels)


def token_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of each position, fp32, in the shape of the labels; no gradient."""
    return token_scores(hidden, weight, labels, bias)[0]


def token_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, whether the label is the most likely token) of each position; no gradient."""
    with torch.no_grad():
        flat = hidden.reshape(-1, hidden.shape[-1])
        rows = _chunk_rows(weight)
        losses, are_right = [], []
        for h, y in zip(flat.split(rows), labels.reshape(-1).split(rows), strict=True):
            logits = linear(h, weight.to(h.dtype), bias).float()
            losses.append(cross_entropy(logits, y, ignore_index=IGNORE_INDEX, reduction="none"))
            are_right.append(logits.argmax(1) == y)
        return torch.cat(losses).view(labels.shape), torch.cat(are_right).view(labels.shape)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]  # a frozen head needs none
        rows = _chunk_rows(weight)
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden) if of_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None
        projection = weight.to(hidden.dtype)
        for start in range(0, hidden.shape[0], rows):
            chunk, target = hidden[start : start + rows], labels[start : start + rows]
            logits = linear(chunk, projection, bias).float()
            counted = (target != IGNORE_INDEX).unsqueeze(1)
            index = target.clamp(min=0).unsqueeze(1)
            normalizer = logits.logsumexp(1, keepdim=True)
            total += ((normalizer - logits.gather(1, index)) * counted).sum()
            if of_hidden or of_weight or of_bias:
                # d loss / d logits = softmax - one hot, nothing where the label is ignored
                gradient = logits.sub_(normalizer).exp_().mul_(counted)
                gradient.scatter_add_(1, index, -counted.float())
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
    def backward(ctx, scale):
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else (hidden_grad * scale).to(hidden_grad.dtype),
            None if weight_grad is None else (weight_grad * scale).to(ctx.dtype),
            None if bias_grad is None else (bias_grad * scale).to(ctx.dtype),
            None,
        )


def _chunk_rows(weight: torch.Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // weight.shape[0])
