"""Losses over a vocabulary, of labels and of a teacher, without ever holding the logits.

Only a chunk of rows of the logits exists at a time, the student's and the teacher's, and its
gradient is taken while it does: the memory is that of some chunks, the arithmetic that of the
plain losses (Hsu et al. 2024, Liger Kernel, describe the scheme; Wijmans et al. 2024 the memory it
saves).

With q the teacher's and p the student's probabilities at a temperature T, and m = (1-β)p + βq:

    forward_kl  KL(q ‖ p)                          Hinton et al. 2015
    reverse_kl  KL(p ‖ q)                          Gu et al. 2024, MiniLLM
    jsd         β KL(q ‖ m) + (1-β) KL(p ‖ m)      Agarwal et al. 2024, GKD; divided by β(1-β) it
                tends to the two above as β → 0 and 1, and at 0 and 1 it is them
    tvd         ½ Σ |p - q|                        Wen et al. 2023

Each is multiplied by T², so that its gradient keeps its size (Hinton et al. 2015).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.functional import linear, pad

from utils.loss import IGNORE_INDEX
from utils.randomness import random_key

CHUNK_ELEMENTS = 2**24  # of logits: 64 MB in fp32
LEAST = -1e30  # of log-probabilities: 0 x this is 0, as 0 x -inf is not
MOST = 80.0  # of a logarithm whose exponential is a float32


@dataclass(frozen=True)
class Divergence:
    """Of the student's distribution from the teacher's; see above."""

    kind: Literal["forward_kl", "reverse_kl", "jsd", "tvd"] = "forward_kl"
    beta: float = 0.5  # of jsd
    temperature: float = 1.0


class Logits(NamedTuple):
    """hidden @ weight.T + bias, times `scale`, then cap x tanh(logits / cap) (Gemma Team 2024)."""

    hidden: torch.Tensor  # (rows, hidden size), or without a weight the logits themselves
    weight: torch.Tensor | None = None  # (vocabulary, hidden size)
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def vocabulary(self) -> int:
        return self.hidden.shape[-1] if self.weight is None else self.weight.shape[0]

    def rows(self, where: slice) -> torch.Tensor:
        """Those rows, in float32 (of float64 in float64)."""
        logits = self.hidden[where]
        if self.weight is not None:
            bias = None if self.bias is None else self.bias.to(logits.dtype)
            logits = linear(logits, self.weight.to(logits.dtype), bias)
        is_given = self.weight is None  # and not to be changed in place
        return changed_logits(logits.to(_wide(logits), copy=is_given), self.scale, self.cap)

    def compared(
        self, log_p: torch.Tensor, where: slice, divergence: Divergence, wants_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of those rows, as a teacher's: (T² x the divergence, its gradient by a student's logits).

        Args:
            log_p: the student's log-probabilities, (rows, vocabulary).
        """
        t, vocabulary = divergence.temperature, log_p.shape[1]
        log_q = self.rows(where)
        common = min(vocabulary, log_q.shape[1])
        # in the very steps of log_p: of two that are equal the difference is 0
        log_q = log_q.sub_(log_q.logsumexp(1, keepdim=True))
        if t != 1 or common < log_q.shape[1]:
            log_q = (log_q[:, :common] / t).log_softmax(1)
        if t != 1 or common < vocabulary:
            log_p = (log_p[:, :common] / t).log_softmax(1)
        log_p, log_q = log_p.clamp(min=LEAST), log_q.clamp_(min=LEAST)
        loss, p, slope, total = compare(log_p, log_q, divergence)
        if not wants_gradient:
            return loss * t**2, None
        gradient = slope.sub_(p.mul_(total))
        if t != 1:
            gradient *= t
        if common < vocabulary:
            gradient = pad(gradient, (0, vocabulary - common))
        return loss * t**2, gradient


def changed_logits(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """The logits times `scale`, then cap x tanh(logits / cap); in place."""
    if scale != 1:
        logits *= scale
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def summed_losses(
    student: Logits,
    labels: torch.Tensor | None = None,
    teacher: Any = None,
    divergence: Divergence | None = None,
    row_weights: torch.Tensor | None = None,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ cross-entropy of the labels, Σ T² x divergence from the teacher), over the rows.

    The gradient is that of hard_weight x the first + soft_weight x the second: they must be
    weighted so, relative to each other, in what is minimised. Where vocabularies differ by padding
    at their ends, the divergence is over the tokens that both have.

    With `label_smoothing` ε a label is (1-ε) of it and ε of all tokens alike (Szegedy et al. 2016);
    `z_loss` times log² Σ exp(logits) is added for each label (Chowdhery et al. 2022, PaLM).

    Args:
        labels: (rows,), -100 adds nothing; None: the first sum is 0.
        teacher: `Logits` of as many rows, without gradients, or another that has `compared`; None:
            the second is 0.
        row_weights: (rows,), of the divergences; None: all 1.
    """
    if labels is None and teacher is None:
        raise ValueError("neither labels nor a teacher")
    return _Summed.apply(
        *student,
        labels,
        teacher,
        divergence,
        row_weights,
        (hard_weight, soft_weight),
        (label_smoothing, z_loss),
    )


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, scale, cap, *losses):
        labels, teacher, divergence, row_weights, weights, (smoothing, z_loss) = losses
        student = Logits(hidden, weight, bias, scale, cap)
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]  # a frozen head needs none
        given = zip(weights, (labels is not None, teacher is not None), strict=True)
        is_weighted = any(weight and is_given for weight, is_given in given)
        wants_gradient = is_weighted and (of_hidden or of_weight or of_bias)
        wide = _wide(hidden)
        sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        hidden_grad = torch.zeros_like(hidden) if of_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if of_weight else None
        bias_grad = torch.zeros_like(bias, dtype=wide) if of_bias else None
        if weight is not None:
            student = student._replace(weight=weight.to(hidden.dtype))
        if isinstance(teacher, Logits) and teacher.weight is not None:
            teacher = teacher._replace(weight=teacher.weight.to(teacher.hidden.dtype))
        size = chunk_rows(student.vocabulary, cap)
        for start in range(0, hidden.shape[0], size):
            where = slice(start, start + size)
            logits = student.rows(where)
            slope = None if cap is None else (logits / cap).square_().neg_().add_(1)  # tanh's
            log_z = logits.logsumexp(1, keepdim=True)
            log_p = logits.sub_(log_z)
            gradient = None
            if teacher is not None:
                of_rows = None if row_weights is None else row_weights[where].to(wide)
                loss, gradient = teacher.compared(log_p, where, divergence, wants_gradient)
                if of_rows is not None:
                    loss = loss * of_rows
                sums[1] += loss.sum(dtype=sums.dtype)
                if wants_gradient:
                    by = weights[1] if of_rows is None else weights[1] * of_rows[:, None]
                    gradient *= by
            if labels is not None:
                target = labels[where]
                counted = (target != IGNORE_INDEX).unsqueeze(1).to(wide)
                index = target.clamp(min=0).unsqueeze(1)
                loss = (smoothing - 1) * log_p.gather(1, index) + z_loss * log_z.square()
                if smoothing:
                    loss -= smoothing * log_p.mean(1, keepdim=True)
                sums[0] += (loss * counted).sum(dtype=sums.dtype)
                if wants_gradient and weights[0]:
                    # d loss / d logits = softmax - one hot, nothing where the label is ignored
                    hard = log_p.exp_().mul_(counted * (1 + 2 * z_loss * log_z))
                    hard.scatter_add_(1, index, (smoothing - 1) * counted)
                    if smoothing:
                        hard -= smoothing / student.vocabulary * counted
                    hard *= weights[0]
                    gradient = hard if gradient is None else gradient.add_(hard)
            if not wants_gradient:
                continue
            if slope is not None:
                gradient *= slope
            if scale != 1:
                gradient *= scale
            low = gradient.to(hidden.dtype)
            if of_hidden:
                hidden_grad[where] = low if weight is None else low @ student.weight
            if of_weight and weight_grad.dtype == low.dtype:
                weight_grad.addmm_(low.T, hidden[where])
            elif of_weight:
                weight_grad += low.T @ hidden[where]
            if of_bias:
                bias_grad += gradient.sum(0)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.dtype = None if weight is None else weight.dtype
        ctx.weights, ctx.used = weights, (labels is not None, teacher is not None)
        return tuple(sums.to(wide).unbind())

    @staticmethod
    def backward(ctx, *of_sums):
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        pairs = list(zip(of_sums, ctx.weights, strict=True))
        used = [pair for pair, is_used in zip(pairs, ctx.used, strict=True) if is_used and pair[1]]
        factor = used[0][0] / used[0][1] if used else 0.0
        for value, weight in used[1:]:
            torch._assert_async(torch.isclose(value, factor * weight, equal_nan=True))
        grads = (hidden_grad, weight_grad, bias_grad)
        dtypes = (hidden_grad, ctx.dtype, ctx.dtype)
        return (
            *(
                None if grad is None else (grad * factor).to(getattr(dtype, "dtype", dtype))
                for grad, dtype in zip(grads, dtypes, strict=True)
            ),
            *(None,) * 8,
        )


def compare(
    log_p: torch.Tensor, log_q: torch.Tensor, divergence: Divergence
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """(D, p, s, Σ s) of each row: D the divergence, s = p x ∂D/∂p.

    The gradient of D by the logits of p is s - p Σ s. Both are 0, and not almost, where p is q.
    """
    kind, beta = divergence.kind, divergence.beta
    if kind == "jsd" and beta in (0, 1):
        kind = "reverse_kl" if beta else "forward_kl"
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        # Σ q - p is 0, but not of what was rounded
        loss = (log_q - log_p).mul_(q).sub_(q).add_(p).sum(1)
        return loss.clamp_(min=0), p, q.neg_(), -1.0
    if kind == "reverse_kl":
        slope = (log_p - log_q).mul_(p)
        loss = (slope - p).add_(q).sum(1)
        return loss.clamp_(min=0), p, slope, slope.sum(1, keepdim=True)
    if kind == "tvd":
        difference = p - q
        loss = difference.abs().sum(1) / 2
        slope = difference.sign_().mul_(p).div_(2)
        return loss, p, slope, slope.sum(1, keepdim=True)
    # log p/m = -log(1 + β (q/p - 1)); where a ratio is more, the share of its divisor is nothing
    ratio = (log_q - log_p).clamp_(-MOST, MOST)
    slope = ratio.expm1().mul_(beta).log1p_().mul_(p).mul_(beta - 1)
    of_q = ratio.neg_().expm1_().mul_(1 - beta).log1p_().mul_(q).mul_(-beta)
    loss = of_q.add_(slope).clamp_(min=0).sum(1)
    return loss, p, slope, slope.sum(1, keepdim=True)


def chunk_rows(vocabulary: int, cap: float | None = None) -> int:
    elements = CHUNK_ELEMENTS if cap is None else CHUNK_ELEMENTS // 2  # and the slope of the cap
    return max(1, elements // vocabulary)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def add_projection(model: Any, teacher: Any, seed: int) -> torch.nn.Module:
    """From the student's width to the teacher's, where they differ; trained with the student.

    A part of the model: checkpoints keep it, an export leaves it out (Jiao et al. 2020, TinyBERT).
    """
    mine, theirs = (c.get_text_config().hidden_size for c in (model.config, teacher.config))
    if mine == theirs:
        return torch.nn.Identity()
    torch.manual_seed(random_key(seed, "projection"))
    # ZeRO-3 takes one dtype for all that it splits
    projection = torch.nn.Linear(mine, theirs, bias=False).to(model.dtype)
    model.distillation_projection = projection
    return projection


def hidden_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    layers: Sequence[int],
    projection: torch.nn.Module,
    kept: torch.Tensor,
) -> torch.Tensor:
    """Σ over the tokens that are kept of the mean squared difference, of embeddings and layers.

    Args:
        student, teacher: of the embeddings and of each layer, (rows, tokens, width).
        layers: as `paired_layers` gives them.
        kept: (rows, tokens), booleans.
    """
    pairs = zip(student, (teacher[layer] for layer in (0, *layers)), strict=True)
    losses = [
        (projection(mine[kept]).float() - theirs[kept].float()).square().mean(1).sum()
        for mine, theirs in pairs
    ]
    return torch.stack(losses).mean()
