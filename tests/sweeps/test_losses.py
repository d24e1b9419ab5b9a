"""Every causal architecture: our loss is its own, document by document, or it is refused.

Refused as the recipe would, on the model as it is initialised; compared with weights so large that
whatever a document sees shows in its loss.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from causal_head import check_model
from packing import pack
from recipes.causal_lm.pretrain import NextTokenLoss
from sweeps.architectures import (
    CannotBuild,
    documents,
    model_types,
    sampled,
    sharpened,
    tiny_model,
)
from utils.config import InputError
from utils.stream import collate

LENGTH = 48
TYPES = [name for name in model_types("causal") if sampled(name)]
# attention that a document's length or a tie decides, and rounding through two layers of it
TOLERANCE = 2e-4


def batch_of(packing: bool) -> dict[str, torch.Tensor]:
    rows = pack(
        ((tokens.numpy().astype(np.int32), None) for tokens in documents()), LENGTH, 0, packing
    )
    return collate(
        [features for (features, pieces), _ in zip(rows, range(4), strict=False) if pieces]
    )


def refusal(model: torch.nn.Module, losses: Callable, packing: bool) -> str | None:
    try:
        with torch.no_grad():
            check_model(model, losses, LENGTH, packing)
    except InputError as error:
        return str(error).removeprefix("model: ")
    return None


def own_losses(model: torch.nn.Module) -> torch.Tensor:
    """Of each token of each document, from the logits of the model that sees it alone."""
    losses = []
    for tokens in documents():
        logits = model(input_ids=tokens[None], use_cache=False).logits[0].float()
        losses.append(cross_entropy(logits[:-1], tokens[1:], reduction="none"))
    return torch.cat(losses)


def found(model_type: str, packing: bool) -> str:
    """What the table says; raises AssertionError where a wrong loss would be trained on."""
    try:
        model = tiny_model("causal", model_type)
    except CannotBuild as error:
        return f"not built: {error}"
    try:
        objective = NextTokenLoss(model, packing)
    except InputError as error:
        return f"refused: {str(error).removeprefix('model: ')}"
    reason = refusal(model, lambda batch: objective(**batch, per_token=True), packing)
    if reason:
        return f"refused: {reason}"
    sharpened(model)
    batch = batch_of(packing)
    counted = batch["shift_labels"] >= 0
    with torch.no_grad():
        losses = objective(**batch, per_token=True)
        ours = losses[counted[:, : losses.shape[1]]]
        torch.testing.assert_close(ours, own_losses(model), atol=TOLERANCE, rtol=TOLERANCE)
        total = objective(**batch)[objective.names[0]]
    torch.testing.assert_close(total, ours.sum(), rtol=1e-5, atol=1e-5)
    return "same"


def further_losses(model_type: str) -> str:
    """Which losses stand beside the cross-entropy, in the sum that is the model's own.

    As it trains: with dropout, of the same draws.
    """
    try:
        model = tiny_model("causal", model_type)
        if hasattr(model.config.get_text_config(), "output_router_logits"):
            model.config.get_text_config().output_router_logits = True
            model.config.output_router_logits = True
        objective = NextTokenLoss(sharpened(model), packing=False)
        tokens = next(documents())[None]
        labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        batch = {"input_ids": tokens, "shift_labels": labels, "position_ids": None}
        batch["lengths"] = torch.tensor([tokens.shape[1]])
    except (CannotBuild, InputError):
        return ""
    if refusal(model, lambda batch: objective(**batch, per_token=True), packing=False):
        return ""

    def drawn(function, *args, **kwargs):
        torch.manual_seed(0)
        with torch.no_grad():
            return function(*args, **kwargs)

    objective.train()
    counts, terms = objective.counts(batch), drawn(objective, **batch)
    ours = sum(terms[name] / counts[name] for name in objective.names)
    # some classes leave the shift of the labels to the caller
    own = [drawn(model, tokens, labels=y, use_cache=False).loss for y in (tokens, labels)]
    nearest = min(own, key=lambda loss: abs(loss - ours))
    torch.testing.assert_close(ours, nearest, rtol=1e-5, atol=1e-5)
    return ", ".join(name for name in objective.names[1:] if terms[name])


@pytest.mark.parametrize("model_type", TYPES)
def test_the_loss_of_training_has_all_terms_of_the_model_s_own(model_type, record):
    record("causal", model_type, **{"further losses": further_losses(model_type)})


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_losses_are_those_of_the_model_or_refused(model_type, packing, results, record):
    cell, column = found(model_type, packing), "packed" if packing else "unpacked"
    record("causal", model_type, **{column: cell})
    if cell != "same":  # what was trained once is not refused now
        assert results.get("causal", {}).get(model_type, {}).get(column) != "same"
