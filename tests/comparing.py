"""What runs are compared by, and what is tried on each: numbers, weights, resumes, the card."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from launching import checkpoints, metrics, predictions, steps


def assert_same_losses(found: Path, expected: Path, tolerance: float) -> None:
    """Of every step, and the gradients by their norm."""
    assert [r["tokens"] for r in steps(found)] == [r["tokens"] for r in steps(expected)]
    for name in ("loss", "grad_norm"):
        values = [[record[name] for record in steps(folder)] for folder in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=tolerance)


def assert_same_run(found: Path, expected: Path, without: tuple[str, ...] = ()) -> None:
    """Losses to 1e-5, all that was measured to 1e-4, weights to 1e-4 by the norm of each.

    Args:
        without: endings of parameters whose gradient is nothing but rounding.
    """
    assert_same_losses(found, expected, 1e-5)
    for one, other in zip(metrics(found), metrics(expected), strict=True):
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=1e-4), name
    weights = load_file(found / "model" / "model.safetensors")
    for name, tensor in load_file(expected / "model" / "model.safetensors").items():
        if not name.endswith(without):
            assert (weights[name] - tensor).norm() < 1e-4 * tensor.norm() + 1e-7, name


def assert_tables_are_told_apart(
    start: Callable, train: Path, test: Path, counted: str | None = None, **settings: Any
) -> None:
    """Two tables are trained on by their weights; two others are tested together as they are alone,
    and the losses of their rows make up the mean.

    Args:
        start: (name, settings) → a recipe that has ended.
        counted: what a line of predictions.jsonl says how much its loss weighs.
    """
    first, second = ({"path": str(train), "split": f"train[{at}]"} for at in (":20", "20:"))
    trained = [first | {"label": "often", "weight": 2}, second | {"label": "seldom", "weight": 0.5}]
    first, second = ({"path": str(test), "split": f"train[{at}]"} for at in (":4", "4:"))
    tested = [first | {"label": "a"}, second | {"label": "b"}]
    settings |= {"train_data": trained, "num_train_epochs": 1, "max_steps": None}
    settings |= {"eval_steps": None, "save_steps": None, "global_batch_size": 8}
    ended = start("apart", test_data=tested, **settings)
    assert ended.status == 0, ended.error
    sizes = re.search(r"often: (\d+) x 2 .*seldom: (\d+) x 0.5 ", ended.output)
    often, seldom = map(int, sizes.groups())
    assert len(steps(ended.folder)) == math.ceil((2 * often + round(seldom / 2)) / 8)
    lines = predictions(ended.folder)
    weights = [line[counted] if counted else 1 for line in lines]
    loss = sum((line["loss"] or 0) * w for line, w in zip(lines, weights, strict=True))
    (both,) = (record for record in metrics(ended.folder) if "test_loss" in record)
    assert loss / sum(weights) == pytest.approx(both["test_loss"], rel=1e-5)
    ended = start("apart", test_data=tested[:1], **settings)
    assert ended.status == 0, ended.error
    (alone,) = (record for record in metrics(ended.folder) if "test_loss" in record)
    apart = {name: values for name, values in both.items() if name.endswith("_by_domain")}
    assert {f"{name}_by_domain" for name in alone if name.startswith("test_")} <= apart.keys()
    for name, values in apart.items():
        if name.startswith("test_") and "a" in values:
            assert values["a"] == pytest.approx(alone[name.removesuffix("_by_domain")], rel=1e-5)
    assert {*both["test_loss_by_domain"]} == {"a", "b"}


def copy_before_its_end(whole: Path, part: Path) -> None:
    """A finished run as it was when its last but one checkpoint had been written."""
    shutil.copytree(whole, part)
    for name in (checkpoints(part)[-1], part / "model"):
        shutil.rmtree(name)
    for name in ("finished.json", "predictions.jsonl"):
        (part / name).unlink()


def run_code_of_card(folder: Path) -> None:
    """What the card of an export shows works."""
    card = (folder / "model" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    exec(compile(code.replace('"."', repr(str(folder / "model"))), "card", "exec"), {})
