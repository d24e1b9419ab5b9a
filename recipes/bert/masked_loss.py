"""From an encoder to its losses, on rows whose sequences do not see each other."""

from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy

from encoder_arguments import EncoderArguments
from example_rows import block_diagonal_mask
from utils.config import InputError
from utils.loss import IGNORE_INDEX, LossArguments
from utils.memory import PAIR_HEADS
from utils.model import check_positions, first_position, optional_inputs


class MaskedLoss(torch.nn.Module):
    """Σ -log p(token | what is not masked), and of the label of each pair of segments.

    The heads see the masked positions and the first token of each pair alone: the logits of all
    other positions are never computed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        objective: str,
        packing: bool,
        added: LossArguments | None = None,
    ):
        super().__init__()
        self.added = added or LossArguments()
        self.model, self.config, self.packing = model, model.config, packing
        self.terms = objective.split("_")  # mlm, and nsp or sop
        self.names = tuple(f"{term}_loss" for term in self.terms)
        self.optional, self.first_position = optional_inputs(model), first_position(model)
        if not packing:  # a model that sees its padding counts it as its clients do
            self.optional = [name for name in self.optional if name != "position_ids"]
        self.targets: torch.Tensor | None = None  # None: all hidden states are wanted
        model.base_model.register_forward_hook(self._keep_targets)

    def forward(self, per_target: bool = False, **batch: torch.Tensor) -> dict[str, Any]:
        """
        Args:
            batch: of shape (rows, sequence_length), as `example_rows.features` names them.

        Returns:
            {term_loss: its sum over the targets}, or if `per_target` {term: (the loss of each
            target, whether the most likely class is right)}, in the order of the rows.
        """
        batch = self.without_empty_columns(batch)
        labels, pair_labels = batch["labels"].flatten(), batch["pair_labels"].flatten()
        targets = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        of_tokens, of_pairs = self.output(batch, targets)
        logits = [of_tokens[0], of_pairs]
        classes = [labels[targets], pair_labels[self.firsts]]
        found = zip(self.terms, logits, classes, strict=False)
        if per_target:
            return {
                term: (cross_entropy(x.float(), y, reduction="none"), x.argmax(1) == y)
                for term, x, y in found
            }
        return {f"{term}_loss": self._summed(term, x.float(), y) for term, x, y in found}

    def _summed(self, term: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum over the targets, of tokens in training with what is `added`."""
        if term != "mlm" or not self.training:
            return cross_entropy(logits, labels, reduction="sum")
        smoothing, z_loss = self.added.label_smoothing_factor, self.added.z_loss
        loss = cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        return loss + z_loss * logits.logsumexp(1).square().sum() if z_loss else loss

    def without_empty_columns(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch; where rows are padded, without columns of nothing but padding."""
        if self.packing:
            return batch
        longest = max(1, int((batch["sequence_ids"] > 0).sum(1).max()))
        return {name: values[:, :longest] for name, values in batch.items()}

    def output(
        self, batch: dict[str, torch.Tensor], targets: torch.Tensor, **flags: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logits of these positions of the flattened rows, (1, targets, vocabulary), and those
        of their pairs, (pairs, 2), if the model has a head for them.

        Args:
            flags: of the model's forward.
        """
        if self.packing:
            mask = block_diagonal_mask(batch["sequence_ids"], self.config, self.model.dtype)
        else:
            mask = (batch["sequence_ids"] > 0).long()
        inputs = batch | {"position_ids": batch["position_ids"] + self.first_position}
        inputs = {name: inputs[name] for name in ("input_ids", *self.optional)}
        self.targets = targets
        self.firsts = (batch["pair_labels"].flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        output = self.model(**inputs, attention_mask=mask, **flags)
        self.targets = None
        of_pairs = output.get("seq_relationship_logits", output.get("sop_logits"))
        return output.get("prediction_logits", output.get("logits")), of_pairs

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        labels = zip(self.names, (batch["labels"], batch["pair_labels"]), strict=False)
        return {name: int((values != IGNORE_INDEX).sum()) for name, values in labels}

    def _keep_targets(self, base_model: torch.nn.Module, _: Any, output: Any) -> Any:
        """Of the hidden states, what the heads are to see."""
        if self.targets is None:
            return output
        hidden = output.last_hidden_state.flatten(0, 1)
        output.last_hidden_state = hidden[self.targets][None]
        if len(self.terms) > 1:
            firsts = hidden[self.firsts]
            if isinstance(base_model.pooler, torch.nn.Linear):  # ALBERT, BigBird
                activation = getattr(base_model, "pooler_activation", None) or base_model.activation
                output.pooler_output = activation(base_model.pooler(firsts))
            else:
                output.pooler_output = base_model.pooler(firsts[:, None])
        return output


def check_model(model: "transformers.PreTrainedModel", args: EncoderArguments) -> None:
    """Raises InputError when the model lacks what the objective, the length or packing needs."""
    kind = model.config.model_type
    if args.packing and "position_ids" not in optional_inputs(model):
        raise InputError(
            f"model: {kind} takes no position_ids, which packed rows need: set packing: false"
        )
    heads = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if args.objective != "mlm" and not heads & PAIR_HEADS:
        raise InputError(
            f"objective: {kind} has no head for pairs, as bert and albert have: set objective: mlm"
        )
    check_positions(model, args.row_length)
