"""Every optimizer on every layout: stopped and resumed, and on 1, 2, 4 and again 1 process.

    SWEEP=1 python -m pytest tests/sweeps/test_optimizers.py

writes optimizers.json and from it the table of docs/optimizers.md. The suite has a sample of it in
tests/utils/test_optimizer.py.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from launching import TINY_RUN, run, steps, tiny_run
from optimizer_table import LAYOUTS, OPTIMIZERS, refused, write

pytestmark = pytest.mark.skipif("SWEEP" not in os.environ, reason="in make sweep: minutes")

RESULTS = Path(__file__).parent / "optimizers.json"
LEGS = (4, 8, 12, 16)
MICRO_BATCH = {1: 16, 2: 4, 4: 1}
RATES = {"sgd": 0.3, "adafactor": 3e-2, "lion_32bit": 3e-4, "muon": 1e-3}
# bitsandbytes keeps tensors of less than 4096 elements in 32 bits
WIDE = {"hidden_size": 64, "intermediate_size": 128}
# 8 bits round: a sum in another order may come to another of their 256 numbers
CLOSE = {"adamw_bnb_8bit": 1e-3}
ALLOWED = [
    (optim, layout) for optim in OPTIMIZERS for layout in LAYOUTS if not refused(optim, layout)
]


@pytest.fixture(scope="module")
def train(tmp_path_factory, corpus_folder, tokenizer_folder):
    """train(folder, optim, config, processes, end) → the records of its steps."""

    def train(folder, optim, config, processes, end):
        settings = {
            "model": {**TINY_RUN["model"], **WIDE, "tie_word_embeddings": True},
            "optim": optim,
            "learning_rate": RATES.get(optim, 1e-3),
            "warmup_steps": 4,
            "weight_decay": 0.5 if optim != "sgd" else 1e-3,
            "max_steps": end,
            "save_steps": 100,
            "per_device_batch_size": MICRO_BATCH[processes],
            "mixed_precision": "bf16" if optim == "adamw_bf16" else "no",
        }
        words = tiny_run(folder, corpus_folder / "train-0.jsonl", tokenizer_folder, **settings)
        run(config, processes, words, tmp_path_factory.getbasetemp() / "log.txt")
        return steps(folder)

    return train


@pytest.mark.parametrize(("optim", "layout"), ALLOWED)
def test_optimizer(optim, layout, tmp_path, train):
    config, processes = LAYOUTS[layout], 1 if layout == "one process" else 2
    whole = train(tmp_path / "whole", optim, config, processes, LEGS[-1])
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.02
    for end in (LEGS[1], LEGS[-1]):
        resumed = train(tmp_path / "resumed", optim, config, processes, end)
    weights = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "resumed")]
    assert resumed == whole
    assert weights[0].read_bytes() == weights[1].read_bytes()
    results = {"same": "bit-identical"}
    if layout != "one process":
        one = train(tmp_path / "one", optim, None, 1, LEGS[-1])
        for end, count in zip(LEGS, (1, 2, 4, 1), strict=True):
            chain = train(tmp_path / "chain", optim, config, count, end)
        found, expected = (np.array([r["loss"] for r in run]) for run in (chain, one))
        results["other"] = float(np.abs(found / expected - 1).max())
    record(optim, layout, results)
    assert results.get("other", 0.0) < CLOSE.get(optim, 1e-5)


def record(optim: str, layout: str, results: dict) -> None:
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known.setdefault(optim, {})[layout] = results
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    write(known)
