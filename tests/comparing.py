"""What runs are compared by, and what is tried on each: numbers, weights, resumes, the card."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launching import checkpoints, metrics, steps


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
