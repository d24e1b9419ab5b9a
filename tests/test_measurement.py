"""What benchmarks report, and how they count and time the turns of a trainer."""

import json
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from benchmarks import trainers
from benchmarks.measurement import describe, median_and_range, ratios, write_results
from benchmarks.trainers import observed, timed, trainer_settings
from recipes.causal_lm import finetune as instruction


def test_ratios_are_taken_turn_by_turn():
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 8.0]) == [2.0, 3.0, 0.5]
    assert median_and_range([2.0, 3.0, 0.5], ".1f") == "2.0 (0.5 to 3.0)"
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


def test_results_hold_the_text_the_facts_and_the_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["stream.py", "--turns", "a b"])
    facts = describe("python -m benchmarks.stream", ("torch",))
    write_results(str(tmp_path / "found" / "stream"), "| a |", facts, {"rates": [1, 2]})
    text = (tmp_path / "found" / "stream.md").read_text()
    assert text.startswith("| a |\n\n- command: python -m benchmarks.stream --turns 'a b'\n")
    assert "| a |" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "found" / "stream.json").read_text())
    assert numbers["rates"] == [1, 2]
    assert numbers["versions"]["torch"] == torch.__version__
    assert f"- commit: {numbers['commit']}\n" in text
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"stream.md", "stream.json"}


def test_a_trainer_is_timed_without_its_first_steps_and_its_padding_is_not_counted(
    tmp_path, monkeypatch
):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    lengths = [3, 5, 2, 4, 1, 6, 2, 2]

    def row(length: int) -> dict[str, list[int]]:
        ids = [1] * length + [0] * (6 - length)
        mask = [1] * length + [0] * (6 - length)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids}

    args = instruction.Arguments(global_batch_size=2, per_device_batch_size=1)
    settings = trainer_settings(args, 4) | {"train_sampling_strategy": "sequential"}
    assert settings["gradient_accumulation_steps"] == 2

    # a clock that ticks once a step
    monkeypatch.setattr(trainers, "time", SimpleNamespace(perf_counter=count().__next__))

    def train(observe):
        data = [row(length) for length in lengths]
        arguments = TrainingArguments(str(tmp_path), **settings)
        observed(Trainer, observe)(model, arguments, train_dataset=data).train()

    found = timed(train, 1, 3)
    # the second and the third step
    assert found == {"seconds": 2, "tokens": 2 + 4 + 1 + 6}
    assert list(tmp_path.iterdir()) == []
