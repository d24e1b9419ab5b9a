"""Adversarial losses beside a reference that is written out, and what must not change them."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    kl_div,
    log_softmax,
    mse_loss,
    softmax,
)
from transformers import BertConfig, BertForSequenceClassification, set_seed

from adversarial import DEFAULTS, Adversarial
from classification_loss import ClassificationLoss
from utils.config import InputError

WIDTH = 16
SMART = {"method": "smart", "epsilon": 0.03, "step_size": 0.05, "initial_magnitude": 0.02}
METHODS = [
    {"method": "fgm"},
    {"method": "fgm", "epsilon": 1.0, "coefficient": 0.5},
    {"method": "pgd", "steps": 3},
    {"method": "pgd", "steps": 2, "epsilon": 0.5, "step_size": 0.6, "coefficient": 0.3},
    {"method": "freelb"},
    {"method": "freelb", "steps": 4, "epsilon": 0.15, "coefficient": 0.7},
    SMART,
    SMART | {"steps": 3, "coefficient": 3.0},
]


def tiny_model(labels: int = 3, dropout: float = 0.0) -> BertForSequenceClassification:
    set_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
        num_labels=labels,
    )
    return BertForSequenceClassification(config).train()


def make_batch(lengths: tuple[int, ...] = (7, 4, 9), padding: int = 0) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    size = len(lengths), max(lengths) + padding
    mask = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.zeros(size, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(5, 40, (length,), generator=draws)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.arange(len(lengths)) % 3,
        "weights": torch.ones(len(lengths)),
        "noise_keys": 100 + torch.arange(len(lengths)),
    }


def losses(settings: dict, batch: dict[str, torch.Tensor], **options) -> dict[str, torch.Tensor]:
    problem = options.pop("problem", "single_label_classification")
    model = options.pop("model", None) or tiny_model()
    return ClassificationLoss(
        model, problem, adversarial=Adversarial(**settings), **options
    ).train()(**batch)


def reference(settings: dict, batch: dict[str, torch.Tensor], model, problem: str) -> tuple:
    """One text after the other, without padding, by the formulas of the papers."""
    values = DEFAULTS[settings["method"]] | settings
    if settings["method"] in ("fgm", "pgd") and "epsilon" in settings:
        for name in ("step_size", "initial_magnitude"):
            if name not in settings:
                values[name] *= settings["epsilon"] / DEFAULTS[settings["method"]]["epsilon"]
    method, radius, size = settings["method"], values["epsilon"], values["step_size"]
    c = settings.get("coefficient", 1.0)
    total_label, total_adversarial = 0.0, 0.0
    table = model.bert.embeddings.word_embeddings
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        ids, label = batch["input_ids"][row : row + 1, :length], batch["labels"][row : row + 1]
        unit = table(ids).detach().pow(2).mean().sqrt() if method in ("fgm", "pgd") else 1.0

        def logits(d: torch.Tensor, ids=ids, unit=unit) -> torch.Tensor:
            return model(inputs_embeds=table(ids) + unit * d).logits

        def label_loss(d: torch.Tensor, label=label, logits=logits) -> torch.Tensor:
            if problem == "regression":
                return mse_loss(logits(d)[0, 0], label[0].float())
            if problem == "multi_label_classification":
                return binary_cross_entropy_with_logits(logits(d), label)
            return cross_entropy(logits(d), label)

        def divergence(d: torch.Tensor, logits=logits) -> torch.Tensor:
            clean, other = logits(torch.zeros_like(d)), logits(d)
            if problem == "regression":
                return mse_loss(clean, other)
            if problem == "multi_label_classification":
                one, two = Bernoulli(logits=clean[0]), Bernoulli(logits=other[0])
                return (kl_divergence(one, two) + kl_divergence(two, one)).mean()
            p, q = log_softmax(clean, 1), log_softmax(other, 1)
            return kl_div(q, softmax(clean, 1), reduction="sum") + kl_div(
                p, softmax(other, 1), reduction="sum"
            )

        draws = torch.Generator().manual_seed(int(batch["noise_keys"][row]))
        d = torch.zeros(1, length, WIDTH)
        if method in ("pgd", "freelb"):
            uniform = torch.empty(length, WIDTH).uniform_(-1, 1, generator=draws)
            d[0] = uniform * values["initial_magnitude"] / math.sqrt(length * WIDTH)
        if method == "smart":
            d[0] = torch.empty(length, WIDTH).normal_(0, 1, generator=draws)
            d *= values["initial_magnitude"]
            d = d.clamp(-radius, radius)
        loss = divergence if method == "smart" else label_loss
        points = [d]
        for _ in range(values["steps"]):
            d = d.detach().requires_grad_()
            loss(d).backward()
            if method == "smart":
                d = (d + size * d.grad / d.grad.abs().max()).clamp(-radius, radius)
            else:
                d = d + size * d.grad / d.grad.norm()
                d = d * min(1.0, radius / d.norm().item())
            points.append(d)
        points = [point.detach() for point in points]
        model.zero_grad()
        used = points[:-1] if method == "freelb" else points[-1:]
        total_adversarial += c * sum(loss(point) for point in used) / len(used)
        share = 1 - c if method in ("pgd", "freelb") else 1.0
        total_label += share * label_loss(torch.zeros(1, length, WIDTH))
    return total_label, total_adversarial


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
):
    whole = math.sqrt(sum(g.norm() ** 2 for g in expected.values()))
    for name in found.keys() | expected.keys():
        assert (found[name] - expected[name]).norm() < tolerance * whole, name


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: f"{s['method']}-{len(s)}")
@pytest.mark.parametrize(
    "problem", ["single_label_classification", "multi_label_classification", "regression"]
)
def test_losses_and_gradients_are_those_of_a_reference(settings: dict, problem: str):
    model, batch = tiny_model(1 if problem == "regression" else 3), make_batch()
    if problem == "regression":
        batch["labels"] = batch["labels"].float()
    if problem == "multi_label_classification":
        batch["labels"] = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]])
    label, adversarial = reference(settings, batch, model, problem)
    expected = gradients(model, label + adversarial)
    found = losses(settings, batch, model=model, problem=problem)
    assert found["label_loss"].item() == pytest.approx(label.item(), rel=1e-5)
    assert found["adversarial_loss"].item() == pytest.approx(adversarial.item(), rel=1e-4)
    assert adversarial.item() > 0
    assert_close(gradients(model, sum(found.values())), expected, 1e-4)


@pytest.mark.parametrize("settings", METHODS[::2] + METHODS[-1:], ids=lambda s: s["method"])
def test_padding_and_other_examples_change_nothing(settings: dict):
    model, batch = tiny_model(), make_batch()
    together = losses(settings, batch, model=model)
    padded = losses(settings, make_batch(padding=4), model=model)
    alone = [
        losses(
            settings, {name: values[row : row + 1] for name, values in batch.items()}, model=model
        )
        for row in range(3)
    ]
    for name, value in together.items():
        # the direction of the worst noise is rounded as well
        assert padded[name].item() == pytest.approx(value.item(), rel=1e-4)
        assert sum(one[name].item() for one in alone) == pytest.approx(value.item(), rel=1e-4)


@pytest.mark.parametrize("method", ["fgm", "pgd", "freelb", "smart"])
def test_the_loss_grows_and_a_row_without_an_example_adds_nothing(method: str):
    batch = make_batch()
    batch["weights"][2] = 0.0
    batch["attention_mask"][2, 1:] = 0
    settings = SMART if method == "smart" else {"method": method}
    model = tiny_model()
    found = losses(settings, batch, model=model)
    two = losses(settings, {name: values[:2] for name, values in batch.items()}, model=model)
    plain = ClassificationLoss(model, "single_label_classification")(**batch)["loss"]
    for name in found:
        assert found[name].item() == pytest.approx(two[name].item(), rel=1e-5)
    if method != "smart":
        assert found["adversarial_loss"].item() > plain.item()
    assert all(g.isfinite().all() for g in gradients(model, sum(found.values())).values())


def test_all_passes_drop_out_the_same():
    still = {"method": "fgm", "epsilon": 0.0}
    torch.manual_seed(0)
    found = losses(still, make_batch(), model=tiny_model(dropout=0.5))
    assert found["adversarial_loss"].item() == found["label_loss"].item()


def test_smoothness_takes_no_weights_of_labels():
    batch = make_batch()
    plain = losses(SMART, batch)
    batch["weights"] = torch.full((3,), 2.0)
    double = losses(SMART, batch)
    assert double["label_loss"].item() == pytest.approx(2 * plain["label_loss"].item())
    assert double["adversarial_loss"].item() == plain["adversarial_loss"].item()


def test_no_gradient_of_a_parameter_is_left_behind():
    model = tiny_model()
    for settings in METHODS:
        losses(settings, make_batch(), model=model)
        assert all(p.grad is None for p in model.parameters())


def test_evaluation_is_not_perturbed():
    objective = ClassificationLoss(
        tiny_model(), "single_label_classification", adversarial=Adversarial("fgm")
    )
    batch = make_batch()
    objective.train()(**batch)
    objective.eval()
    logits = objective(**batch, predict=True)
    plain = tiny_model().eval()(batch["input_ids"], batch["attention_mask"]).logits
    assert torch.equal(logits, plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "pgd", "steps": 0}, "steps must be at least 1, not 0"),
        ({"method": "smart", "epsilon": -1.0}, "epsilon must not be negative, not -1.0"),
        ({"method": "freelb", "coefficient": 2.0}, "at most 1, not 2.0"),
        ({"method": "fgm", "step_size": 1.0}, "step_size: fgm takes one step of length epsilon"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        Adversarial(**settings).check("no")


def test_a_method_fits_its_step_to_its_ball():
    filled: Callable = lambda **settings: Adversarial(**settings).filled()  # noqa: E731
    assert filled(method="fgm", epsilon=2.0).step_size == 2.0
    assert filled(method="pgd", epsilon=2.0).step_size == 0.5
    assert filled(method="pgd", epsilon=2.0, step_size=0.1).step_size == 0.1
    assert filled(method="freelb", epsilon=2.0).step_size == 0.1
