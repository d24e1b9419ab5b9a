"""What optimizers do and keep, on which launch, and their learning rate."""

import itertools
import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from launching import ROOT, checkpoints, run, steps, tiny_run
from optimizer_table import LAYOUTS, OPTIMIZERS, refused, table
from utils import checkpoint
from utils.arguments import TrainingArguments
from utils.config import InputError
from utils.fragments import optimizer_step_count
from utils.optimizer import make_optimizer, stochastically_rounded


def updated(l1_decay: float, steps: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Linear(50, 20)
    arguments = TrainingArguments(learning_rate=0.01, weight_decay=0.0, l1_decay=l1_decay)
    optimizer = make_optimizer(model, arguments)
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
    matrices, vectors = make_optimizer(
        model, TrainingArguments(weight_decay=0.3, l1_decay=0.1)
    ).param_groups
    assert (matrices["weight_decay"], matrices["l1_decay"]) == (0.3, 0.1)
    assert (vectors["weight_decay"], vectors["l1_decay"]) == (0.0, 0.0)
    assert len(matrices["params"]) == 1
    assert len(vectors["params"]) == 3
    assert matrices["lr_ratio"] == vectors["lr_ratio"] == pytest.approx(1.0)


class Block(torch.nn.Module):
    """Matrices of odd shapes in layers, an embedding, a head and vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(11, 7)
        shapes = [(7, 5), (5, 64), (64, 65), (65, 9)]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*shape) for shape in shapes)
        self.head = torch.nn.Linear(9, 11)

    def forward(self, step: int) -> torch.Tensor:
        x = self.embedding((torch.arange(6) * (step + 2)) % 11)
        for layer in self.layers:
            x = layer(x).tanh()
        return torch.nn.functional.cross_entropy(self.head(x), torch.arange(6) + step % 5)


def build(optim: str, **settings) -> tuple[Block, torch.optim.Optimizer]:
    model = Block()
    return model, make_optimizer(model, TrainingArguments(optim=optim, **settings), seed=3)


def train(model: Block, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    losses = []
    for step in steps:
        with torch.autocast("cpu", torch.bfloat16, enabled=model.head.weight.dtype != torch.float):
            loss = model(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("saved", [0, 5])
def test_every_optimizer_goes_on_from_a_checkpoint_to_the_bit(optim, saved, tmp_path):
    settings = {"weight_decay": 0.1, "l1_decay": 1e-3, "learning_rate": 0.01}
    model, optimizer = build(optim, **settings)
    train(model, optimizer, range(saved))
    folder = tmp_path / f"step-{saved:08d}"
    checkpoint.save(folder, model, optimizer, {})
    count = optimizer_step_count(optimizer)
    expected = train(model, optimizer, range(saved, saved + 5))

    other, other_optimizer = build(optim, **settings)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(7)
    torch.manual_seed(9)  # nothing is drawn from here
    checkpoint.load(folder, other, other_optimizer, count)
    assert train(other, other_optimizer, range(saved, saved + 5)) == expected
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_adafactor_keeps_is_rows_and_columns(tmp_path):
    model, optimizer = build("adafactor")
    train(model, optimizer, range(1))
    checkpoint.save(tmp_path / "step-00000001", model, optimizer, {})
    (file,) = tmp_path.glob("*/rank-*.safetensors")
    sizes = {key: tensor.numel() for key, tensor in load_file(file).items()}
    assert sizes["row_var/layers.1.weight"] == 64
    assert sizes["col_var/layers.1.weight"] == 5
    assert sizes["variance/layers.1.bias"] == 64


def orthogonalized(gradient: torch.Tensor) -> torch.Tensor:
    """Five quintic Newton-Schulz iterations, as Jordan et al. 2024 define them."""
    x = gradient / gradient.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(5, 7), (64, 3), (1, 9), (9, 1), (16, 16)], ids=str)
def test_muons_update_is_that_of_float64_but_for_bf16(shape):
    """torch iterates in bf16, of 8 bits: its update is within 6 % of the exact one, by norm."""
    layers = torch.nn.Sequential(torch.nn.Linear(*shape[::-1], bias=False))
    weight = layers[0].weight
    arguments = TrainingArguments(optim="muon", learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(layers, arguments)
    expected, momentum = weight.detach().double(), torch.zeros(shape, dtype=torch.float64)
    for _ in range(3):
        weight.grad = torch.randn(shape)
        gradient = weight.grad.double()
        momentum = 0.95 * momentum + 0.05 * gradient
        update = orthogonalized(0.05 * gradient + 0.95 * momentum)
        before = weight.detach().double()
        optimizer.step()
        expected = before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * max(shape) ** 0.5 * update
        moved = before - expected
        assert (weight - expected).norm() < 0.06 * moved.norm()


def test_a_transposed_matrix_moves_by_the_transposed_update():
    given, found = torch.randn(5, 7), []
    for gradient in (given, given.T.contiguous()):
        layers = torch.nn.Sequential(torch.nn.Linear(*gradient.shape[::-1], bias=False))
        torch.nn.init.zeros_(layers[0].weight)
        layers[0].weight.grad = gradient
        make_optimizer(layers, TrainingArguments(optim="muon", learning_rate=0.1)).step()
        found.append(layers[0].weight.detach())
    assert torch.equal(found[0], found[1].T)


def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest():
    model, optimizer = build("muon")
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [(g["is_of_muon"], {names[p] for p in g["params"]}) for g in optimizer.param_groups]
    matrices = {f"layers.{number}.weight" for number in range(4)}
    assert groups[0] == (True, matrices)
    assert set().union(*(held for is_of_muon, held in groups if not is_of_muon)) == (
        {*names.values()} - matrices
    )


def test_what_moves_by_adamw_under_muon_moves_as_under_adamw():
    moved = []
    for optim in ("muon", "adamw_torch_fused"):
        model, optimizer = build(optim, learning_rate=0.01)
        train(model, optimizer, range(1))
        moved.append(model)
    for (name, one), two in zip(moved[0].named_parameters(), moved[1].parameters(), strict=True):
        is_of_muon = name.startswith("layers") and name.endswith("weight")
        assert torch.equal(one, two) != is_of_muon, name


def test_stochastic_rounding_takes_a_neighbour_and_keeps_the_mean():
    draw = torch.Generator().manual_seed(0)
    values = torch.full((100_000,), 1 + 1 / 512 + 1 / 2048)  # 5/16 of the way from 1 to 1 + 1/128
    rounded = stochastically_rounded(values, draw).double()
    assert {*rounded.tolist()} == {1.0, 1 + 1 / 128}
    assert (rounded == 1).double().mean() == pytest.approx(11 / 16, abs=0.01)
    exact = torch.tensor([0.0, -1.5, 3e38, 1e-30]).bfloat16()
    assert torch.equal(stochastically_rounded(exact.float(), draw), exact)


def test_bf16_weights_follow_adamw_of_fp32_weights():
    """Updates of 1e-4 of a weight, which rounding to the nearest would lose, all of them."""
    found = {}
    for optim in ("adamw_bf16", "adamw_torch_fused"):
        layer = torch.nn.Linear(200, 200, bias=False)
        torch.nn.init.ones_(layer.weight)
        arguments = TrainingArguments(optim=optim, learning_rate=1e-4, weight_decay=0.0)
        optimizer = make_optimizer(layer, arguments)
        for _ in range(100):
            layer.weight.grad = torch.ones(200, 200)
            optimizer.step()
        found[optim] = layer.weight.double().mean().item()
        assert layer.weight.dtype == optimizer.state[layer.weight]["exp_avg"].dtype
    assert found["adamw_torch_fused"] == pytest.approx(0.99, abs=1e-5)
    assert found["adamw_bf16"] == pytest.approx(0.99, abs=2e-4)


def test_gradients_of_bf16_weights_are_summed_in_fp32():
    layer = torch.nn.Linear(1, 1, bias=False)
    make_optimizer(layer, TrainingArguments(optim="adamw_bf16"))
    for value in (1.0, *[2**-10] * 64):
        layer(torch.tensor([[value]], dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad.item() == 1 + 64 / 1024  # in bf16 each of them would vanish


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_launch_that_does_not_go_with_an_optimizer_is_refused(optim, layout, monkeypatch):
    stage = int(layout[-1]) if layout.startswith("ZeRO") else 0
    monkeypatch.setattr("utils.optimizer.launched_zero_stage", lambda: stage)
    monkeypatch.setattr("utils.optimizer.launched_with", lambda what: layout == "FSDP2")
    processes = 1 if layout == "one process" else 2
    monkeypatch.setattr("utils.optimizer.launched_world_size", lambda: processes)
    precision = "bf16" if optim == "adamw_bf16" else "no"
    arguments = TrainingArguments(optim=optim, max_steps=1, mixed_precision=precision)
    if refused(optim, layout):
        message = rf"optim: {optim} .*: launch .*\.yaml\), or take adamw_torch_fused"
        with pytest.raises(InputError, match=message):
            arguments.check()
    else:
        arguments.check()


def test_bf16_weights_need_bf16():
    with pytest.raises(InputError, match="adamw_bf16 needs mixed_precision: bf16"):
        TrainingArguments(optim="adamw_bf16", max_steps=1).check()


def test_the_table_of_the_docs_is_what_was_measured_and_is_refused():
    results = json.loads((ROOT / "tests/sweeps/optimizers.json").read_text())
    assert table(results) in (ROOT / "docs/optimizers.md").read_text()


@pytest.mark.parametrize("optim", ["adamw_bf16", "muon"])
def test_a_run_goes_on_to_the_bit(optim, pretrain):
    precision = "bf16" if optim == "adamw_bf16" else "no"
    settings = {"optim": optim, "mixed_precision": precision, "learning_rate": 3e-3}
    whole = pretrain("whole", max_steps=6, **settings)
    for end in (3, 6):
        part = pretrain("part", max_steps=end, **settings)
    assert steps(part.folder) == steps(whole.folder)
    assert steps(whole.folder)[-1]["loss"] < steps(whole.folder)[0]["loss"]
    models = [run.folder / "model" / "model.safetensors" for run in (part, whole)]
    assert models[0].read_bytes() == models[1].read_bytes()
    changed = pretrain("part", max_steps=9, optim="sgd")
    assert changed.status == 2
    assert f"the optimizer was {'AdamWBf16' if optim != 'muon' else 'Muon'} and is SGD" in (
        changed.error
    )


@pytest.mark.parametrize(("optim", "config"), [("muon", "multi_cpu"), ("lion_32bit", "zero3")])
def test_one_process_goes_on_where_two_have_stopped(
    optim, config, pretrain, tmp_path, corpus_folder, tokenizer_folder
):
    settings = {"optim": optim, "learning_rate": 1e-3, "warmup_steps": 3}
    whole = pretrain("whole", max_steps=8, **settings)
    words = tiny_run(
        whole.folder.with_name("part"),
        corpus_folder / "train-0.jsonl",
        tokenizer_folder,
        max_steps=4,
        **settings,
    )
    run(config, 2, words, tmp_path / "log")
    part = pretrain("part", max_steps=8, **settings)
    found, expected = ([r["loss"] for r in steps(f.folder)] for f in (part, whole))
    assert found == pytest.approx(expected, rel=1e-5)


# the learning rate over time


def test_a_schedule_is_as_far_as_the_larger_share_of_steps_and_hours():
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 4}
    by_steps = TrainingArguments(max_steps=24, **settings).learning_rate_factor(24)
    both = TrainingArguments(max_steps=24, max_hours=2.0, **settings).learning_rate_factor(24)
    for step in range(25):
        assert both(step, 0.0) == by_steps(step)
    assert both(2, 1.9) == by_steps(2)  # the warmup is of steps
    assert both(5, 1.0) == pytest.approx(0.5)
    assert both(14, 0.5) == by_steps(14) == pytest.approx(0.5)
    assert both(14, 5.0) == 0
    by_hours = TrainingArguments(max_hours=2.0, **settings).learning_rate_factor(None)
    assert [by_hours(step, 0.0) for step in (0, 2, 4, 900)] == pytest.approx([0, 0.5, 1, 1])
    assert [by_hours(9, hours) for hours in (0.5, 1.0, 2.0, 3.0)] == pytest.approx(
        [0.75, 0.5, 0, 0]
    )


def test_the_learning_rate_ends_where_the_hours_end_it(pretrain, monkeypatch):
    clock = itertools.count()  # a second a look: a step takes one
    fake = SimpleNamespace(**vars(time) | {"monotonic": lambda: float(next(clock))})
    monkeypatch.setattr("utils.training.time", fake)
    settings = {"max_hours": 7.5 / 3600, "lr_scheduler_type": "linear", "save_steps": 3}
    whole = pretrain("run", keep_last=9, **settings)
    rates = [record["learning_rate"] for record in steps(whole.folder)]
    assert rates == pytest.approx([3e-3 * (1 - step / 7.5) for step in range(8)])
    shutil.rmtree(checkpoints(whole.folder)[-1])  # of the end
    (whole.folder / "finished.json").unlink()
    again = pretrain("run", keep_last=9, **settings)
    assert "step-00000006" in again.output
    assert [record["learning_rate"] for record in steps(again.folder)] == rates
