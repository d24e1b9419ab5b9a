"""What a launch asks for beside the recipe's settings: taken, or refused by name."""

import json
from pathlib import Path

import pytest

from utils.arguments import TrainingArguments
from utils.config import InputError
from utils.ranks import launched_zero_stage

ARGUMENTS = {"max_steps": 5, "learning_rate": 1e-3, "mixed_precision": "bf16"}
AUTO = {
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": "auto"}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": "auto"}},
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0},
    "elasticity": {"enabled": False, "max_train_batch_size": 2000},
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1,
    "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
}
OTHERS = {
    "optimizer.type is Lamb, and for the recipe AdamW": {"optimizer": {"type": "Lamb"}},
    "optimizer.params.lr is 0.1, and for the recipe 0.001": {"optimizer": {"params": {"lr": 0.1}}},
    "optimizer.params.freeze_step is 9, and for the recipe unknown": {
        "optimizer": {"type": "AdamW", "params": {"freeze_step": 9}}
    },
    "scheduler.type is linear, and for the recipe cosine": {"scheduler": {"type": "WarmupDecayLR"}},
    "scheduler.params.warmup_num_steps is 10, and for the recipe unknown": {
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 10}}
    },
    "train_batch_size is 32, and for the recipe 64": {"train_batch_size": 32},
    "train_batch_size is 24, and for the recipe 64": {"train_micro_batch_size_per_gpu": 6},
    "train_batch_size is 12, and for the recipe 64": {
        **{"train_micro_batch_size_per_gpu": 3, "train_batch_size": "auto"}
    },
    "gradient_clipping is 0.5, and for the recipe 1.0": {"gradient_clipping": 0.5},
    "bf16.enabled is False, and for the recipe True": {"bf16": {"enabled": False}},
    "fp16.enabled is True, and for the recipe False": {"fp16": {"enabled": True}},
    "elasticity.enabled is True, and for the recipe unknown": {
        "elasticity": {"enabled": True, "max_train_batch_size": 9}
    },
}


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """launched(content): TrainingArguments of two processes under a DeepSpeed JSON."""

    def check(content: str | dict) -> None:
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
        monkeypatch.setenv("WORLD_SIZE", "2")
        TrainingArguments(**ARGUMENTS).check()

    return check


def test_what_agrees_with_the_settings_is_taken(launched):
    launched(AUTO)
    assert launched_zero_stage() == 3


@pytest.mark.parametrize("told", OTHERS)
def test_what_does_not_is_refused_by_name(told, launched, tmp_path):
    with pytest.raises(InputError) as error:
        launched(AUTO | OTHERS[told])
    assert str(error.value) == (
        f'DeepSpeed config {tmp_path}/ds.json: {told}: set it to "auto", or leave it out'
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{'stage': 2}", "ds.json is not JSON: Expecting property name enclosed in double quotes"),
        ("", "ds.json is not JSON: Expecting value"),
        ("[]", "ds.json: zero_optimization.stage must be 1, 2 or 3, not None"),
        ({}, "ds.json: zero_optimization.stage must be 1, 2 or 3, not None"),
        ({"zero_optimization": True}, "stage must be 1, 2 or 3, not None"),
        ({"zero_optimization": {"stage": 0}}, "stage must be 1, 2 or 3, not 0; without ZeRO"),
    ],
)
def test_what_is_no_config_of_zero(content, told, launched):
    with pytest.raises(InputError) as error:
        launched(content)
    assert told in str(error.value)


def test_a_file_that_is_not_there(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds_configs/zero4.json")
    with pytest.raises(InputError) as error:
        TrainingArguments(**ARGUMENTS).check()
    assert str(error.value) == (
        "DeepSpeed config ds_configs/zero4.json: No such file or directory; "
        f"looked for from {Path.cwd()}"
    )


@pytest.mark.parametrize("what", ["MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_another_way_to_be_parallel(what, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{what}", "true")
    with pytest.raises(InputError, match=f"ACCELERATE_USE_{what}: launch with DDP"):
        TrainingArguments(**ARGUMENTS).check()
