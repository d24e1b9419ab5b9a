"""The loss of a text's label."""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from adversarial import Adversarial, Adversary, symmetric_divergence


class ClassificationLoss(torch.nn.Module):
    """Σ of the loss of each text's label: cross-entropy, of each label's yes or no, or squared.

    With an adversary the adversarial loss stands beside it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        problem_type: str,
        label_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        adversarial: Adversarial | None = None,
    ):
        super().__init__()
        self.model, self.problem_type, self.label_smoothing = model, problem_type, label_smoothing
        self.label_weights = None if label_weights is None else torch.tensor(label_weights)
        is_plain = adversarial is None or adversarial.coefficient == 0
        self.adversary = None if is_plain else Adversary(model, adversarial)
        self.names = ("loss",) if is_plain else ("label_loss", "adversarial_loss")

    def forward(
        self,
        labels: torch.Tensor,
        weights: torch.Tensor,
        noise_keys: torch.Tensor,
        predict: bool = False,
        **inputs: torch.Tensor,
    ) -> Any:
        """
        Args:
            labels, weights, noise_keys: (rows,), labels also (rows, labels).
            inputs: input_ids and attention_mask, of some models token_type_ids: (rows, tokens).

        Returns:
            {name: the sum of its losses}, or if `predict` the logits, (rows, labels).
        """

        def logits() -> torch.Tensor:
            return self.model(**inputs).logits.float()

        if predict:
            return logits()
        if self.adversary is None or not self.training:
            return {self.names[0]: (weights * self.label_losses(logits(), labels)).sum()}
        label, adversarial = self.adversary.losses(
            logits,
            partial(self.label_losses, labels=labels),
            partial(symmetric_divergence, self.problem_type),
            inputs["attention_mask"],
            noise_keys,
        )
        # how smooth the model is has nothing to do with labels and their weights
        is_smart = self.adversary.settings.method == "smart"
        of_adversary = (weights > 0).float() if is_smart else weights
        sums = (weights * label).sum(), (of_adversary * adversarial).sum()
        return dict(zip(self.names, sums, strict=True))

    def label_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(rows, labels) → (rows,)"""
        weights = self.label_weights
        weights = None if weights is None else weights.to(logits.device)
        smoothing = self.label_smoothing
        if self.problem_type == "regression":
            return mse_loss(logits.squeeze(1), labels, reduction="none")
        if self.problem_type == "single_label_classification":
            return cross_entropy(
                logits, labels, weights, reduction="none", label_smoothing=smoothing
            )
        labels = labels * (1 - smoothing) + smoothing / 2
        return binary_cross_entropy_with_logits(
            logits, labels, reduction="none", pos_weight=weights
        ).mean(1)

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        return dict.fromkeys(self.names, int((batch["weights"] > 0).sum()))
