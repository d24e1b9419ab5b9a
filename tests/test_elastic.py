"""Runs whose number of processes, ZeRO stage or micro-batches change give the same numbers."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from launching import checkpoints, metrics, run, state, steps, tiny_run
from safetensors import safe_open
from safetensors.numpy import load_file

LEGS = (14, 28, 42, 56)  # the steps at which the launch changes
MICRO_BATCH = {1: 16, 2: 4, 4: 1}  # by the number of processes; accumulation makes up the rest
CHAINS = {
    "no ZeRO": [("cpu", 1), ("multi_cpu", 2), ("multi_cpu", 4), (None, 1)],
    "ZeRO-1": [("zero1", 1), ("zero1", 2), ("zero1", 4), ("zero1", 1)],
    "ZeRO-2": [("zero2", 1), ("zero2", 2), ("zero2", 4), ("zero2", 1)],
    "ZeRO-3": [("zero3", 1), ("zero3", 2), ("zero3", 4), ("zero3", 1)],
    "all stages": [("multi_cpu", 2), ("zero3", 4), ("zero2", 1), ("zero1", 2)],
}
# the gradients of a step pass through another order of summation, and the weights through Adam
SETTINGS = {"warmup_steps": 12, "weight_decay": 0.5, "max_steps": LEGS[-1]}


@pytest.fixture(scope="module")
def start(tmp_path_factory, corpus_folder, tokenizer_folder):
    """start(config, processes, output_dir, **settings): run to the end; returns the output."""
    logs = tmp_path_factory.mktemp("logs")

    def run_to_the_end(config, processes, output_dir, train=None, **settings) -> str:
        train = train or corpus_folder / "train-0.jsonl"
        arguments = tiny_run(output_dir, train, tokenizer_folder, **settings)
        return run(config, processes, arguments, logs / "log.txt")

    return run_to_the_end


@pytest.fixture(scope="module")
def reference(tmp_path_factory, start) -> Path:
    """One process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    start(None, 1, folder, **SETTINGS, per_device_batch_size=16)
    return folder


@pytest.mark.parametrize("chain", CHAINS)
def test_processes_and_stages_change_and_the_run_goes_on(chain, tmp_path, start, reference):
    for end, (config, processes) in zip(LEGS, CHAINS[chain], strict=True):
        settings = {**SETTINGS, "max_steps": end, "per_device_batch_size": MICRO_BATCH[processes]}
        output = start(config, processes, tmp_path, **settings)
        assert f"{end} steps" in output
    found, expected = steps(tmp_path), steps(reference)
    assert [record["step"] for record in found] == list(range(1, LEGS[-1] + 1))
    for key in ("step", "tokens", "learning_rate"):
        assert [record[key] for record in found] == [record[key] for record in expected]
    np.testing.assert_allclose(
        [record["loss"] for record in found], [r["loss"] for r in expected], rtol=1e-5
    )
    np.testing.assert_allclose(
        [record["grad_norm"] for record in found], [r["grad_norm"] for r in expected], rtol=1e-4
    )
    # where every lane stands: the documents were the same ones, in the same order
    last, last_expected = state(checkpoints(tmp_path)[-1]), state(checkpoints(reference)[-1])
    assert last["stream"] == last_expected["stream"]
    assert len(last["stream"]) == 8
    assert max(lane["places"][0][0] for lane in last["stream"].values()) >= 1  # beyond an epoch
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for name, expected_weight in load_file(reference / "model" / "model.safetensors").items():
        difference = np.linalg.norm(weights[name] - expected_weight)
        assert difference < 1e-4 * np.linalg.norm(expected_weight), name


SPLITS = [
    (None, 1, 16),
    (None, 1, 2),
    ("multi_cpu", 2, 8),
    ("multi_cpu", 4, 1),
    ("zero1", 2, 2),
    ("zero2", 2, 2),
    ("zero2", 4, 4),
    ("zero3", 2, 2),
    ("zero3", 4, 1),
]


def fragment_norms(checkpoint: Path, kind: str) -> dict[str, float]:
    """Norm of each tensor of a checkpoint, whichever way it is cut."""
    squares: dict[str, float] = {}
    for path in checkpoint.glob("rank-*.safetensors"):
        with safe_open(path, "numpy") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                if key.startswith(f"{kind}/"):
                    values = file.get_tensor(key).astype(np.float64)
                    squares[key] = squares.get(key, 0.0) + float(values @ values)
    return {key: math.sqrt(square) for key, square in squares.items()}


@pytest.fixture(scope="module")
def splits(tmp_path_factory, start) -> dict[tuple, Path]:
    folders = {}
    for config, processes, size in SPLITS:
        folder = tmp_path_factory.mktemp("split")
        settings = {**SETTINGS, "max_steps": 20, "max_hours": 0.0} 
        settings = {"max_steps": 3, "save_steps": 1, "keep_last": 3, "warmup_steps": 2}
        start(config, processes, folder, **settings, per_device_batch_size=size)
        folders[config, processes, size] = folder
    return folders


@pytest.mark.parametrize("split", SPLITS[1:], ids=str)
def test_the_split_of_the_global_batch_changes_nothing(split, splits):
    found, expected = splits[split], splits[SPLITS[0]]
    for record, other in zip(steps(found), steps(expected), strict=True):
        print(split, record["step"], record["loss"]/other["loss"]-1, record["grad_norm"]/other["grad_norm"]-1)
    # nothing of the weights depends on the stage that they are initialised under
    first, first_expected = checkpoints(found)[0], checkpoints(expected)[0]
    for key, norm in fragment_norms(first_expected, "exp_avg").items():
        print(key, fragment_norms(first, "exp_avg")[key]/norm-1)
    for key, norm in fragment_norms(first_expected, "parameter").items():
        print(key, fragment_norms(first, "parameter")[key]/norm-1)
