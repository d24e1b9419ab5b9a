"""What an update does beside AdamW's: the L1 decay."""

import pytest
import torch

from utils.arguments import TrainingArguments
from utils.optimizer import adamw


def updated(l1_decay: float, steps: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Linear(50, 20)
    arguments = TrainingArguments(learning_rate=0.01, weight_decay=0.0, l1_decay=l1_decay)
    optimizer = adamw(model, arguments)
    for _ in range(steps):
        model(torch.ones(4, 50)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_one_update_is_that_of_adamw_and_then_soft_thresholding():
    plain, shrunk = updated(0.0, steps=1), updated(2.0, steps=1)
    weight = plain["weight"]
    expected = weight.sign() * (weight.abs() - 0.01 * 2.0).clamp(min=0)
    assert torch.allclose(shrunk["weight"], expected, atol=1e-7)
    assert 0.05 < (shrunk["weight"] == 0).float().mean() < 0.5
    assert torch.equal(shrunk["bias"], plain["bias"])


def test_weights_become_zero_and_stay():
    assert (updated(5.0, steps=10)["weight"] == 0).all()


def test_without_it_nothing_changes():
    expected = updated(0.0)
    torch.manual_seed(0)
    model = torch.nn.Linear(50, 20)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    for _ in range(3):
        model(torch.ones(4, 50)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name])


def test_groups_know_their_rate_and_decay():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    matrices, vectors = adamw(model, TrainingArguments(weight_decay=0.3, l1_decay=0.1)).param_groups
    assert (matrices["weight_decay"], matrices["l1_decay"]) == (0.3, 0.1)
    assert (vectors["weight_decay"], vectors["l1_decay"]) == (0.0, 0.0)
    assert len(matrices["params"]) == 1
    assert len(vectors["params"]) == 3
    assert matrices["lr_ratio"] == vectors["lr_ratio"] == pytest.approx(1.0)
