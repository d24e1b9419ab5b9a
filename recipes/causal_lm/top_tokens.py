"""A teacher's likeliest tokens, and how far a student is from what they tell of it."""

import math
from typing import NamedTuple

import torch

from utils.divergences import Divergence, Logits, chunk_rows, compare


class TopTokens(NamedTuple):
    """What is kept of a teacher's distributions: its likeliest tokens; all others are one more."""

    token_ids: torch.Tensor  # (rows, k)
    log_probabilities: torch.Tensor  # (rows, k), at the temperature of the divergence

    def compared(
        self, log_p: torch.Tensor, where: slice, divergence: Divergence, wants_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As that of `Logits`: over the likeliest tokens, and one place for all others."""
        ids, t = self.token_ids[where], divergence.temperature
        if t != 1:
            log_p = (log_p / t).log_softmax(1)
        kept, log_q = log_p.gather(1, ids), self.log_probabilities[where].to(log_p)
        has_rest = ids.shape[1] < log_p.shape[1]
        if has_rest:
            rest = log_p.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True)
            # what is left of 1 is as exact as the probabilities that were kept
            of_teacher = log_q.double().exp().sum(1, keepdim=True)
            least = torch.finfo(log_q.dtype).tiny
            log_q = torch.cat([log_q, (1 - of_teacher).clamp(min=least).log().to(log_q)], 1)
            kept = torch.cat([kept, rest.clamp(min=math.log(least))], 1)
        loss, p, slope, total = compare(kept, log_q, divergence)
        if not wants_gradient:
            return loss * t**2, None
        if has_rest:  # by the share that each token has in it
            gradient = log_p.exp() * (slope[:, -1:] / p[:, -1:] - total)
        else:
            gradient = torch.empty_like(log_p)
        gradient.scatter_(1, ids, (slope - p * total)[:, : ids.shape[1]])
        return loss * t**2, gradient * t


def top_tokens(logits: Logits, k: int, temperature: float) -> TopTokens:
    """The k likeliest tokens of each row and their log-probabilities, the likeliest first."""
    size, parts = chunk_rows(logits.vocabulary, logits.cap), []
    for start in range(0, len(logits.hidden), size):
        chunk = logits.rows(slice(start, start + size)).div_(temperature)
        values, ids = chunk.topk(k)
        parts.append((ids, values - chunk.logsumexp(1, keepdim=True)))
    if not parts:
        return TopTokens(logits.hidden.new_zeros(0, k).long(), logits.hidden.new_zeros(0, k))
    return TopTokens(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
