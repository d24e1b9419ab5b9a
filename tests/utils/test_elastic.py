"""Runs whose number of processes, ZeRO stage or micro-batches change give the same numbers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from launching import TINY_RUN, checkpoints, metrics, run, state, steps, tiny_run

LEGS = (14, 28, 42, 56)  # the steps at which the launch changes
MICRO_BATCH = {1: 16, 2: 4, 4: 1}  # by the number of processes; accumulation makes up the rest
CHAINS = {
    "no ZeRO": [("cpu", 1), ("multi_cpu", 2), ("multi_cpu", 4), (None, 1)],
    "ZeRO-1": [("zero1", 1), ("zero1", 2), ("zero1", 4), ("zero1", 1)],
    "ZeRO-2": [("zero2", 1), ("zero2", 2), ("zero2", 4), ("zero2", 1)],
    "ZeRO-3": [("zero3", 1), ("zero3", 2), ("zero3", 4), ("zero3", 1)],
    "all stages": [("multi_cpu", 2), ("zero3", 4), ("zero2", 1), ("zero1", 2)],
    "FSDP2": [("fsdp2", 2), ("fsdp2", 4), ("zero3", 2), ("fsdp2", 1)],
}
SETTINGS = {
    "model": {**TINY_RUN["model"], "tie_word_embeddings": True},
    "learning_rate": 1e-3,
    "warmup_steps": 12,
    "weight_decay": 0.5,
    "max_steps": LEGS[-1],
}
SPLITS = [  # processes and sequences a micro-batch
    (None, 1, 2),
    ("multi_cpu", 2, 8),
    ("multi_cpu", 4, 1),
    ("zero1", 2, 2),
    ("zero2", 2, 2),
    ("zero3", 2, 2),
    ("zero3", 4, 1),
    ("fsdp2", 2, 2),
]
SPLIT_SETTINGS = {"max_steps": 3, "save_steps": 1, "keep_last": 3, "warmup_steps": 2}
# weights that are drawn anew and scaled, and matrices with a learning rate of their own
SCALED = {"initialization": "depth_scaled", "mup_base_width": 16}


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
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [record[key] for record in found], [record[key] for record in expected], rtol=1e-5
        )
    # where every lane stands: the documents were the same ones, in the same order
    last, last_expected = state(checkpoints(tmp_path)[-1]), state(checkpoints(reference)[-1])
    assert last["stream"] == last_expected["stream"]
    assert len(last["stream"]) == 8
    assert max(lane["lane"]["places"][0][0] for lane in last["stream"].values()) == 1  # epochs
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for name, expected_weight in load_file(reference / "model" / "model.safetensors").items():
        difference = np.linalg.norm(weights[name] - expected_weight)
        assert difference < 1e-5 * np.linalg.norm(expected_weight), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory, start) -> Path:
    """Three steps on one process, each batch in one piece."""
    folder = tmp_path_factory.mktemp("whole")
    start(None, 1, folder, **SPLIT_SETTINGS, **SCALED, per_device_batch_size=16)
    return folder


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: "-".join(map(str, split)))
def test_the_split_of_a_batch_changes_no_loss_and_no_gradient(split, tmp_path, start, whole):
    config, processes, size = split
    start(config, processes, tmp_path, **SPLIT_SETTINGS, **SCALED, per_device_batch_size=size)
    for key in ("loss", "grad_norm"):
        found, expected = ([record[key] for record in steps(f)] for f in (tmp_path, whole))
        assert len(found) == 3
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    # after the first step `exp_avg` is a tenth of the clipped gradient
    found, expected = (fragments(checkpoints(folder)[0]) for folder in (tmp_path, whole))
    gradients = [key for key in expected if key.startswith("exp_avg/")]
    assert len(gradients) == 21
    for key in gradients:
        norm, expected_norm = np.linalg.norm(found[key]), np.linalg.norm(expected[key])
        np.testing.assert_allclose(norm, expected_norm, rtol=1e-6, err_msg=key)
    # the learning rate of the first step is 0: these are the weights as they were initialised
    for key in (key for key in expected if key.startswith("parameter/")):
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


MIXTRAL = {
    **TINY_RUN["model"],
    "model_type": "mixtral",
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}


def test_the_router_loss_is_the_same_on_any_number_of_processes(tmp_path, start):
    """It is of a micro-batch: these are single rows, on every layout."""
    settings = {**SPLIT_SETTINGS, "model": MIXTRAL, "per_device_batch_size": 1, "max_steps": 2}
    for name, config, processes in (("one", None, 1), ("two", "zero2", 2)):
        start(config, processes, tmp_path / name, **settings)
    one, two = (steps(tmp_path / name) for name in ("one", "two"))
    for key in ("loss", "cross_entropy", "router_aux_loss", "grad_norm"):
        expected = [record[key] for record in one]
        np.testing.assert_allclose([record[key] for record in two], expected, rtol=1e-6)


def fragments(checkpoint: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, flattened and put together."""
    pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
    for path in checkpoint.glob("rank-*.safetensors"):
        with safe_open(path, "numpy") as file:
            starts = json.loads(file.metadata()["starts"])
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                place = starts[key.partition("/")[2]]
                pieces.setdefault(key, []).append((place, file.get_tensor(key)))
    return {key: np.concatenate([p for _, p in sorted(pieces[key])]) for key in pieces}


@pytest.fixture(scope="module")
def few_documents(tmp_path_factory, corpus_folder) -> Path:
    """13 documents of 3 to 120 words: some lanes get two, others none."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    lines = (corpus_folder / "train-1.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:13]))
    return path


EPOCH_SETTINGS = {"max_steps": None, "weight_decay": 0.5}


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory, start, few_documents) -> Path:
    folder = tmp_path_factory.mktemp("epoch")
    sources = [{"path": str(few_documents), "epochs": 1}]
    output = start(None, 1, folder, train_sources=sources, **EPOCH_SETTINGS)
    assert "the data is spent" in output
    return folder


@pytest.mark.parametrize(
    ("config", "processes"), [("multi_cpu", 2), ("multi_cpu", 4), ("zero3", 2)]
)
def test_an_epoch_of_uneven_lanes_ends_on_all_processes_together(
    config, processes, tmp_path, start, few_documents, one_epoch
):
    sources = [{"path": str(few_documents), "epochs": 1}]
    output = start(config, processes, tmp_path, train_sources=sources, **EPOCH_SETTINGS)
    assert "the data is spent" in output
    found, expected = steps(tmp_path), steps(one_epoch)
    assert len(found) == len(expected) == 3
    for record, other in zip(found, expected, strict=True):
        assert record["tokens"] == other["tokens"]
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert found[-1]["tokens"] - found[-2]["tokens"] < 16 * 32  # rows of padding at the end
    last, last_expected = state(checkpoints(tmp_path)[-1]), state(checkpoints(one_epoch)[-1])
    assert last["stream"] == last_expected["stream"]
    assert all(record["loss"] > 1 for record in found)


def test_limits_of_tokens_and_hours_end_a_run_in_order(tmp_path, start):
    settings = {"save_steps": 100, "max_tokens": 3 * 16 * 32 - 7}
    output = start("zero1", 2, tmp_path, **settings)
    assert "3 steps" in output
    assert len(steps(tmp_path)) == 3
    output = start("zero1", 2, tmp_path, save_steps=100, max_steps=50, max_hours=1e-9)
    assert "max_hours: 1e-09 have passed" in output
    assert len(steps(tmp_path)) == 3
    output = start("zero1", 2, tmp_path, save_steps=100, max_steps=50, max_hours=1e-9)
    assert "finished" in output


@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3"])
def test_bf16_resumes_bit_for_bit(config, tmp_path, start):
    settings = {"mixed_precision": "bf16", "max_steps": 6, "save_steps": 3}
    start(config, 2, tmp_path, **settings)
    undisturbed = metrics(tmp_path), (tmp_path / "model" / "model.safetensors").read_bytes()
    # as a kill leaves it that comes just before the second checkpoint
    shutil.rmtree(checkpoints(tmp_path)[-1])
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "finished.json").unlink()
    output = start(config, 2, tmp_path, **settings)
    assert "continuing" in output
    assert "step-00000003" in output
    assert metrics(tmp_path) == undisturbed[0]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == undisturbed[1]


@pytest.mark.parametrize("origin", ["model_name_or_path", "warm_start"])
def test_other_weights_are_the_same_beginning_under_zero3(origin, tmp_path, start, reference):
    beginnings = {
        "model_name_or_path": reference / "model",
        "warm_start": checkpoints(reference)[0],
    }
    settings = {**SETTINGS, "max_steps": 3, "warmup_steps": 0, origin: str(beginnings[origin])}
    for config, processes in ((None, 1), ("zero3", 2)):
        start(config, processes, tmp_path / f"{config}", **settings)
    found, expected = ([r["loss"] for r in steps(tmp_path / f)] for f in ("zero3", "None"))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[0] < steps(reference)[0]["loss"] - 0.5  # it has learnt something
