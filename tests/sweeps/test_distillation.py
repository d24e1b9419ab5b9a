"""Every architecture as its own teacher: what is learnt of it is what it computes, or is refused.

Two models of a type with other weights, so large that whatever a token sees shows; the divergence
and the hidden states beside those of transformers' own forward, document by document.
"""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax, mse_loss

from example_rows import fit
from masked_check import check_objective, check_signals
from masked_loss import check_model as check_masked
from recipes.bert import distill as bert
from recipes.causal_lm import distill as causal_lm
from sweeps import test_losses as causal
from sweeps import test_masked as masked
from sweeps.architectures import (
    CannotBuild,
    documents,
    model_types,
    sampled,
    sharpened,
    tiny_model,
)
from utils.config import InputError

SIGNALS = {
    None: "distilled",
    "hidden_weight": "hidden states",
    "attention_weight": "attention",
    "relation_weight": "relations",
}


def two_models(kind: str, model_type: str) -> list[torch.nn.Module]:
    """A student and its teacher, with other weights."""
    return [sharpened(tiny_model(kind, model_type), seed=seed) for seed in (0, 1)]


def divergence(logits: list[torch.Tensor]) -> torch.Tensor:
    """Σ KL(teacher ‖ student) of (tokens, vocabulary)."""
    student, teacher = (log_softmax(x.double(), -1) for x in logits)
    return kl_div(student, teacher, reduction="sum", log_target=True)


def compared(ours: torch.Tensor, own: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), own.double(), rtol=1e-4, atol=1e-4)


def of_causal(model_type: str, packing: bool) -> str:
    try:
        models = two_models("causal", model_type)
    except CannotBuild as error:
        return f"not built: {error}"
    arguments = causal_lm.TextArguments(output_dir="", hard_weight=1.0, packing=packing)
    try:
        objective = causal_lm.DistillationLoss(*models, arguments, []).eval()
    except InputError as error:
        return f"refused: {str(error).removeprefix('model: ')}"
    for model, whose in zip(models, ("student", "teacher"), strict=True):
        reason = causal.refusal(
            model, lambda batch, of=whose: objective(**batch, scores_of=of)[0], packing
        )
        if reason:
            return f"refused: {reason}"
    own = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for tokens in documents():
            logits = [model(input_ids=tokens[None], use_cache=False).logits[0] for model in models]
            own += divergence([x[:-1] for x in logits])
        compared(objective(**causal.batch_of(packing))["soft_loss"], own)
    return "same"


def of_masked(model_type: str, packing: bool, signal: str | None) -> str:
    try:
        models = two_models("masked", model_type)
    except CannotBuild as error:
        return f"not built: {error}"
    weights = {signal: 1.0} if signal else {}
    a = bert.Arguments(output_dir="", packing=packing, relation_heads=4, **weights)
    a.sequence_length = masked.LENGTH
    try:
        layers = bert.check_pair(a, *(model.config for model in models))
        for model in models:
            check_masked(model, a)
        taught = bert.observed(models[1], layers, a)
        objective = bert.DistillationLoss(models[0], taught, torch.nn.Identity(), layers, a)
        with torch.no_grad():
            for part in (taught, objective):
                scores = scores_of(part)
                check_objective(part, scores, [masked.LENGTH])
            check_signals(lambda batch: taught(**batch), model_type)
            batch = masked.batch_of(fit(examples(models[0]), masked.LENGTH, packing))
            torch.manual_seed(0)
            losses = objective(**batch)
    except InputError as error:
        return f"refused: {str(error).removeprefix('model: ')}"
    assert all(loss.isfinite() for loss in losses.values())
    if signal in ("attention_weight", "relation_weight"):
        return "same"
    own = torch.zeros(2, dtype=torch.float64)
    given = examples(models[0])
    with torch.no_grad():
        # some models see their padding, which of a padded row is a part
        for part in [[e] for e in given] if packing else [given]:
            rows = masked.batch_of([[e] for e in part], max(len(e.labels) for e in part))
            kept = rows["sequence_ids"] > 0
            inputs = {"input_ids": rows["input_ids"], "attention_mask": kept.long()}
            of_models = []
            for model in models:
                torch.manual_seed(0)
                of_models.append(model(**inputs, output_hidden_states=bool(signal)))
            own[0] += divergence([output.logits[kept] for output in of_models])
            if signal:
                pairs = zip(*(output.hidden_states for output in of_models), strict=True)
                means = [mse_loss(mine[kept], its[kept]).double() for mine, its in pairs]
                own[1] += torch.stack(means).mean() * kept.sum()
    compared(losses["soft_loss"], own[0])
    if signal:
        compared(losses["hidden_loss"], own[1])
    return "same"


def scores_of(part: torch.nn.Module) -> Callable[[dict[str, torch.Tensor]], dict]:
    return lambda batch: part(**batch, per_target=True)


def examples(model: torch.nn.Module) -> list:
    return masked.examples(model.config.get_text_config().vocab_size, with_pairs=False)


def recorded(kind, model_type, column, cells, results, record):
    """Of packed and of padded rows; what was learnt once is not refused now."""
    packed, unpacked = cells
    cell = "unpacked: same" if unpacked == "same" != packed else unpacked
    record(kind, model_type, **{column: cell})
    once = results.get(kind, {}).get(model_type, {}).get(column, "")
    assert cell == once or not once.endswith("same")


@pytest.mark.parametrize("model_type", [x for x in model_types("causal") if sampled(x)])
def test_what_causal_models_learn(model_type, results, record):
    cells = [of_causal(model_type, packing) for packing in (True, False)]
    recorded("causal", model_type, "distilled", cells, results, record)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("model_type", masked.TYPES)
def test_what_encoders_learn(model_type, signal, results, record):
    cells = [of_masked(model_type, packing, signal) for packing in (True, False)]
    recorded("masked", model_type, SIGNALS[signal], cells, results, record)
