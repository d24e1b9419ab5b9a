"""Adversarial training on the embeddings: FGM, PGD, FreeLB and SMART's smoothness term.

The perturbation d is added to what the input embeddings put out, for each example in the direction
in which its loss grows. With L the loss of an example, c the coefficient, and N(g) = g / |g|, of
the largest element in smart and else of l2:

    fgm     L(0) + c L(e N(g(0)))                           Miyato et al. 2017
    pgd     (1 - c) L(0) + c L(d_K)                         Madry et al. 2018
    freelb  (1 - c) L(0) + c/K (L(d_0) + … + L(d_{K-1}))    Zhu et al. 2020, Algorithm 1
    smart   L(0) + c D(d_K)                                 Jiang et al. 2020, equation 2

    d_{k+1} = P(d_k + step_size N(g(d_k))), g the gradient of L by d (in smart, of D), P the
    projection on the ball of radius e (epsilon)

D compares the outputs with and without d: KL(p||q) + KL(q||p), of each label's yes and no where
there may be several; of a regression the squared difference. Norms are taken over all tokens of an
example together, so that neither padding nor other examples matter. Every pass over a micro-batch
drops out the same (Zhu et al. 2020, 3.3): what differs between passes is d alone.

The gradients by d are taken for d alone, in passes of their own: gradients of parameters, and the
hooks by which DDP and ZeRO reduce them, are not involved. A step holds one graph for each L or D
above in memory, and costs K more passes without the gradients of parameters (freelb: K - 1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import transformers

from utils.config import InputError

# What the papers trained with, where Adversarial is left open. fgm: on IMDB, for embeddings of unit
# variance; pgd: Madry's seven steps of a quarter of the radius, on fgm's ball; freelb: RoBERTa on
# MNLI, by its published script; smart: 4.1 of the paper.
DEFAULTS = {
    "fgm": {"steps": 1, "epsilon": 5.0, "step_size": 5.0, "initial_magnitude": 0.0},
    "pgd": {"steps": 7, "epsilon": 5.0, "step_size": 1.25, "initial_magnitude": 5.0},
    "freelb": {"steps": 2, "epsilon": 0.3, "step_size": 0.1, "initial_magnitude": 0.1},
    "smart": {"steps": 1, "epsilon": 1e-5, "step_size": 1e-3, "initial_magnitude": 1e-5},
}
# whose lengths are in units of the root mean square of the example's embeddings
RELATIVE = ("fgm", "pgd")
# which train on the perturbed texts in the place of the texts themselves
REPLACING = ("pgd", "freelb")


@dataclass
class Adversarial:
    """Adversarial training; what is null is as in the method's paper."""

    method: Literal["fgm", "pgd", "freelb", "smart"]
    coefficient: float = 1.0  # of the adversarial loss; 0: plain training
    steps: int | None = None  # of ascent; in freelb also the losses that are averaged
    # lengths of l2 (smart: the largest element): of the perturbation at most, of a step, and of the
    # random start (fgm has none); in fgm and pgd in units of the embeddings' root mean square
    epsilon: float | None = None
    step_size: float | None = None
    initial_magnitude: float | None = None

    def check(self, mixed_precision: str) -> None:
        if self.method == "smart" and mixed_precision != "no":
            raise InputError(
                "adversarial: smart compares what perturbations of "
                f"{self.filled().epsilon:g} do, which is lost in {mixed_precision}: set "
                "mixed_precision: no"
            )
        if self.steps is not None and self.steps < 1:
            raise InputError(f"adversarial.steps must be at least 1, not {self.steps}")
        for name in ("coefficient", "epsilon", "step_size", "initial_magnitude"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"adversarial.{name} must not be negative, not {value}")
        if self.method in REPLACING and self.coefficient > 1:
            raise InputError(
                f"adversarial.coefficient: {self.method} trains on its losses in the place of the "
                f"texts' own: at most 1, not {self.coefficient}"
            )
        if self.method == "fgm":
            for name in ("steps", "step_size", "initial_magnitude"):
                if getattr(self, name) is not None:
                    raise InputError(f"adversarial.{name}: fgm takes one step of length epsilon")

    def filled(self) -> "Adversarial":
        """With the paper's values in the place of null."""
        values = dict(DEFAULTS[self.method])
        if self.epsilon is not None and self.method in RELATIVE:
            for name in ("step_size", "initial_magnitude"):
                values[name] *= self.epsilon / values["epsilon"]
        given = {name: getattr(self, name) for name in values}
        return replace(self, **{k: values[k] if v is None else v for k, v in given.items()})


class Adversary:
    """Perturbs the input embeddings of a model while it is trained.

    Args:
        model: with a hook on its input embeddings from here on.
    """

    def __init__(self, model: "transformers.PreTrainedModel", settings: Adversarial):
        self.settings = settings.filled()
        self.embeddings = model.get_input_embeddings()
        self.embeddings.register_forward_hook(self._perturb)
        self.perturbation: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None

    def losses(
        self,
        logits_of_batch: Callable[[], torch.Tensor],
        label_losses: Callable[[torch.Tensor], torch.Tensor],
        divergences: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        mask: torch.Tensor,
        noise_keys: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each example the loss of its label and the adversarial loss, with their coefficients.

        Args:
            logits_of_batch: one pass over the micro-batch: (rows, labels).
            label_losses: logits → (rows,).
            divergences: (logits, other logits) → (rows,).
            mask: of what is no padding: (rows, tokens).
            noise_keys: of the random start of each row, int64: (rows,).
        """
        s = self.settings
        self.mask = mask[:, :, None].float()

        def logits_at(perturbation: torch.Tensor | None) -> torch.Tensor:
            self.perturbation = perturbation
            devices = [mask.device] if mask.is_cuda else []
            try:
                with torch.random.fork_rng(devices):  # the same dropout in every pass
                    return logits_of_batch()
            finally:
                self.perturbation = None

        own_share = 1 - s.coefficient if s.method in REPLACING else 1.0
        own = None if own_share == 0 else logits_at(None)

        def loss_at(perturbation: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
            logits = logits_at(perturbation)
            return divergences(own, logits) if s.method == "smart" else label_losses(logits)

        points = self._ascend(
            lambda d: loss_at(d, None if own is None else own.detach()), noise_keys
        )
        adversarial = torch.stack([loss_at(point, own) for point in points]).mean(0)
        label_loss = torch.zeros_like(adversarial) if own is None else own_share * label_losses(own)
        return label_loss, s.coefficient * adversarial

    def _ascend(
        self, loss_at: Callable[[torch.Tensor], torch.Tensor], noise_keys: torch.Tensor
    ) -> list[torch.Tensor]:
        """The perturbations to train on: the last one, in freelb all of the way."""
        s = self.settings
        keeps_all = s.method == "freelb"
        points = [self._project(self._start(noise_keys))]
        for _ in range(s.steps - keeps_all):
            point = points[-1].requires_grad_()
            (gradient,) = torch.autograd.grad(loss_at(point).sum(), point)
            length = self._length(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
            points.append(self._project(point.detach() + s.step_size * gradient / length))
        return [point.detach() for point in (points if keeps_all else points[-1:])]

    def _start(self, noise_keys: torch.Tensor) -> torch.Tensor:
        """A function of the example's key and length: not of its row or of the padding."""
        s, width = self.settings, self.embeddings.embedding_dim
        noise = torch.zeros(*self.mask.shape[:2], width)
        for row, (key, length) in enumerate(
            zip(noise_keys.tolist(), self.mask.sum((1, 2)).int().tolist(), strict=True)
        ):
            draws, own = torch.Generator().manual_seed(key), noise[row, :length]
            if s.method == "smart":
                own.normal_(0, 1, generator=draws)
            elif s.initial_magnitude > 0:
                own.uniform_(-1, 1, generator=draws).div_(math.sqrt(max(own.numel(), 1)))
        return s.initial_magnitude * noise.to(self.mask.device)

    def _length(self, values: torch.Tensor) -> torch.Tensor:
        """Of each example, over all of its tokens: (rows, 1, 1)."""
        order = math.inf if self.settings.method == "smart" else 2
        return torch.linalg.vector_norm(values, order, dim=(1, 2), keepdim=True)

    def _project(self, values: torch.Tensor) -> torch.Tensor:
        epsilon = self.settings.epsilon
        if self.settings.method == "smart":
            return values.clamp(-epsilon, epsilon)
        length = self._length(values).clamp_min(torch.finfo(values.dtype).tiny)
        return values * (epsilon / length).clamp_max(1.0)

    def _perturb(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> Any:
        if self.perturbation is None:
            return output
        added = self.perturbation * self.mask
        if self.settings.method in RELATIVE:
            squares = (output.detach().float() * self.mask).square().sum((1, 2), keepdim=True)
            count = self.mask.sum((1, 2), keepdim=True) * output.shape[-1]
            added = added * (squares / count).sqrt()
        return output + added.to(output.dtype)


def symmetric_divergence(
    problem_type: str, logits: torch.Tensor, others: torch.Tensor
) -> torch.Tensor:
    """KL(p||q) + KL(q||p), of a regression the squared difference: (rows,).

    As Σ (p - q) (log p - log q), which loses no digits where p is close to q.
    """
    if problem_type == "regression":
        return (logits - others).square().mean(1)
    if problem_type == "multi_label_classification":
        return ((logits.sigmoid() - others.sigmoid()) * (logits - others)).mean(1)
    p, q = logits.log_softmax(1), others.log_softmax(1)
    return ((p.exp() - q.exp()) * (p - q)).sum(1)
