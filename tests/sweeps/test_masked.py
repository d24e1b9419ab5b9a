"""Every masked language model: the recipe's loss is its own, packed or not, or it is refused.

Refused as the recipe would; compared with weights so large that whatever a token sees shows.
"""

from inspect import signature
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForPreTraining
from transformers.models.auto.modeling_auto import MODEL_FOR_PRETRAINING_MAPPING_NAMES

from example_rows import features, fit
from masked_check import check_objective
from masked_loss import MaskedLoss, check_model
from masking import Example
from sweeps.architectures import (
    CannotBuild,
    documents,
    model_types,
    sampled,
    sharpened,
    tiny_config,
    tiny_model,
)
from utils.config import InputError
from utils.loss import IGNORE_INDEX

LENGTH = 48
# positions that begin at 2; padding that was counted otherwise than by a client; a pooler without
# its activation; windows of a composite config; a random forward
EVER_WRONG = {"yoso", "mra", "fnet", "convbert", "big_bird", "modernvbert", "reformer", "bart"}
TYPES = [name for name in model_types("masked") if sampled(name) or name in EVER_WRONG]
MASK = 4


def has_pairs(model_type: str) -> bool:
    """Whether it has a head that learns what pairs of segments are."""
    name = MODEL_FOR_PRETRAINING_MAPPING_NAMES.get(model_type)
    if name is None or not hasattr(transformers, name):
        return False
    names = signature(getattr(transformers, name).forward).parameters
    return not {"next_sentence_label", "sentence_order_label"}.isdisjoint(names)


def examples(vocabulary: int, with_pairs: bool) -> list[Example]:
    """Of the documents: every third token is to be predicted, and of a pair what it is."""
    made = []
    for number, document in enumerate(documents()):
        tokens, places = document.numpy().astype(np.int32) % vocabulary, np.arange(len(document))
        labels = np.where(places % 3 == 1, tokens, IGNORE_INDEX).astype(np.int32)
        masked = np.where(labels >= 0, MASK, tokens).astype(np.int32)
        types = ((places > len(tokens) // 2) & with_pairs).astype(np.int32)
        pair = number % 2 if with_pairs else IGNORE_INDEX
        made.append(Example(masked, labels, types, pair, number, len(tokens), 0, 0))
    return made


def batch_of(rows: list[list[Example]], length: int = LENGTH) -> dict[str, torch.Tensor]:
    made = [features(row, length) for row in rows]
    return {key: torch.from_numpy(np.stack([row[key] for row in made])).long() for key in made[0]}


def own_losses(model: torch.nn.Module, given: list[Example], with_pairs: bool) -> list[float]:
    """The sums of the losses that the model's own is the mean of, of rows with padding."""
    batch = batch_of([[example] for example in given], max(len(e.labels) for e in given))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": (batch["sequence_ids"] > 0).long()}
    labels, pairs = batch["labels"], batch["pair_labels"][:, 0]
    if model.config.is_encoder_decoder:
        # its own reads the labels; its clients (fill-mask) have it read what is masked
        logits = model(**inputs).logits.flatten(0, 1)
        return [float(cross_entropy(logits, labels.flatten(), reduction="sum"))]
    count = int((labels != IGNORE_INDEX).sum())
    if not with_pairs:
        return [float(model(**inputs, labels=labels).loss) * count]
    inputs["token_type_ids"] = batch["token_type_ids"]
    # the loss is a sum of means
    both = model(**inputs, labels=labels, **{pair_label(model): pairs})
    of_pairs = float(cross_entropy(both[2], pairs))
    return [(float(both.loss) - of_pairs) * count, of_pairs * len(given)]


def pair_label(model: torch.nn.Module) -> str:
    """What the model calls the label of a pair: of its order (ALBERT), or whether it is one."""
    names = signature(model.forward).parameters
    return "sentence_order_label" if "sentence_order_label" in names else "next_sentence_label"


def build(model_type: str, with_pairs: bool) -> torch.nn.Module:
    if not with_pairs:
        return tiny_model("masked", model_type)
    torch.manual_seed(0)
    return AutoModelForPreTraining.from_config(tiny_config(model_type)).eval()


def found(model_type: str, with_pairs: bool, packing: bool) -> str:
    """What the table says; raises AssertionError where a wrong loss would be trained on."""
    try:
        model = build(model_type, with_pairs)
    except CannotBuild as error:
        return f"not built: {error}"
    objective = "mlm"
    if with_pairs:
        objective = "mlm_sop" if "order" in pair_label(model) else "mlm_nsp"
    loss = MaskedLoss(model, objective, packing)
    try:
        check_model(model, SimpleNamespace(objective=objective, packing=packing, row_length=LENGTH))
        with torch.no_grad():
            check_objective(loss, lambda batch: loss(**batch, per_target=True), [LENGTH])
    except InputError as error:
        return f"refused: {str(error).removeprefix('model: ')}"
    sharpened(model)
    given = examples(model.config.get_text_config().vocab_size, with_pairs)
    alone = [[example] for example in given] if packing else [given]
    with torch.no_grad():
        torch.manual_seed(0)  # Reformer's buckets are drawn
        ours = [float(total) for total in loss(**batch_of(fit(given, LENGTH, packing))).values()]
        torch.manual_seed(0)
        own = [own_losses(model, part, with_pairs) for part in alone]
    assert ours == pytest.approx(np.sum(own, axis=0), rel=2e-5)
    return "same"


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_losses_are_those_of_the_model_or_refused(model_type, packing, results, record):
    cell, column = found(model_type, False, packing), "packed" if packing else "unpacked"
    record("masked", model_type, **{column: cell})
    if cell != "same":  # what was trained once is not refused now
        assert results.get("masked", {}).get(model_type, {}).get(column) != "same"


@pytest.mark.parametrize("model_type", [name for name in TYPES if has_pairs(name)])
def test_losses_of_pairs_are_those_of_the_model_or_refused(model_type, results, record):
    cells = [found(model_type, True, packing) for packing in (True, False)]
    cell = "same" if cells == ["same"] * 2 else f"unpacked: {cells[1]}"
    record("masked", model_type, pairs=cell)
    if cell != "same":
        assert results.get("masked", {}).get(model_type, {}).get("pairs") != "same"
