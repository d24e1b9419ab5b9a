"""Every classifier: the loss of a padded batch is its own, or the model is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from classification_examples import check_tokenizer, collate, configure
from classification_loss import ClassificationLoss
from sweeps.architectures import (
    VOCABULARY,
    CannotBuild,
    documents,
    model_types,
    sampled,
    sharpened,
    tiny_config,
    tiny_model,
)
from utils.config import InputError
from utils.model import check_positions

NAMES = ["a", "b", "c"]
PROBLEM = "single_label_classification"
SIZES = (11, 5, 20, 9)  # Funnel and CANINE, which halve their rows, take none of two tokens
EVER_WRONG = {"xlnet"}  # reads the padding
TYPES = [name for name in model_types("classification") if sampled(name) or name in EVER_WRONG]


def build(model_type: str) -> torch.nn.Module:
    """The model as the recipe sets it up; raises CannotBuild and InputError."""
    config = tiny_config(model_type)
    check_tokenizer(SimpleNamespace(pad_token="<pad>", pad_token_id=0), config, max(SIZES))
    configure(config, NAMES, PROBLEM, {})
    model = type(tiny_model("classification", model_type))(config).eval()
    check_positions(model, max(SIZES))
    return sharpened(model)


def found(model_type: str) -> dict[str, str]:
    """Column → what the table says; AssertionError where a wrong loss would be trained on."""
    try:
        model = build(model_type)
    except CannotBuild as error:
        return {"loss": f"not built: {error}"}
    except InputError as error:
        return {"loss": f"refused: {str(error).removeprefix('model: ')}"}
    # CANINE has characters
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", VOCABULARY)
    rows = [
        [{"input_ids": 3 + tokens.numpy() % (vocabulary - 3), "label": np.int64(number % 3)}]
        for number, tokens in enumerate(documents(SIZES))
    ]
    batch = collate(rows, 0, 0)
    objective = ClassificationLoss(model, PROBLEM)
    with torch.no_grad():
        torch.manual_seed(0)  # Reformer's buckets are drawn
        ours = float(objective(**batch)["loss"])
        torch.manual_seed(0)
        own = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
        alone = sum(float(objective(**collate([row], 0, 0))["loss"]) for row in rows)
    assert ours == pytest.approx(float(own.loss) * len(rows), rel=1e-5)
    is_seen = ours != pytest.approx(alone, rel=1e-3)
    return {"loss": "same", "padding": "changes what the model itself computes" if is_seen else ""}


@pytest.mark.parametrize("model_type", TYPES)
def test_the_loss_is_the_model_s_own_or_it_is_refused(model_type, results, record):
    cells = found(model_type)
    record("classification", model_type, **cells)
    if cells["loss"] != "same":  # what was trained once is not refused now
        assert results.get("classification", {}).get(model_type, {}).get("loss") != "same"
