"""What leaves is what was trained: exports are held against what the run itself computed."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from launching import TINY_BERT, TINY_RUN, checkpoints, state, write_state
from utils import comparison, export
from utils.config import command

MIXTRAL = TINY_RUN["model"] | {
    "model_type": "mixtral",
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.0,
}


@pytest.fixture
def run_export(monkeypatch, capfd):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            command(export.main)
        return end.value.code, *capfd.readouterr()

    return run


def lose_a_layer(whole_model):
    def build(*args):
        model = whole_model(*args)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.zero_()
        return model

    return build


def test_an_export_that_would_not_be_the_same_is_refused(
    pretrain, run_export, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        patch.setattr(export, "_whole_model", lose_a_layer(export._whole_model))
        ended = pretrain(max_steps=2, learning_rate=0.1)
        (source,) = checkpoints(ended.folder)
        status, _, error = run_export("--checkpoint", source, "--output_dir", tmp_path / "out")
    assert (ended.status, status) == (2, 2)
    message = "would not be what was trained: model.layers.1.mlp.down_proj.weight has other numbers"
    assert f"error: {ended.folder}/model {message}" in ended.error
    assert ended.error.count("\n") == 1
    assert error == ended.error.replace(str(ended.folder / "model"), str(tmp_path / "out"))
    names = {path.name for path in ended.folder.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "checkpoints"}
    # what was at fault mended, the same command ends the run
    assert pretrain(max_steps=2, learning_rate=0.1).status == 0
    assert (ended.folder / "model").exists()


def test_a_checkpoint_is_held_against_its_run(pretrain, run_export, tmp_path):
    ended = pretrain(max_steps=2)
    (source,) = checkpoints(ended.folder)
    file = source / "rank-00000-of-00001.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    held = load_file(file)
    held["parameter/model.layers.0.self_attn.o_proj.weight"] += 0.05
    save_file(held, file, metadata)
    write_state(source, state(source))  # as if it had been written so
    status, _, error = run_export("--checkpoint", source, "--output_dir", tmp_path / "out")
    assert status == 2
    assert "would not be what was trained: its logits differ by" in error
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_reads_otherwise_is_refused(pretrain, monkeypatch):
    from_pretrained = comparison.transformers.AutoTokenizer.from_pretrained

    def other(name, *args, **options):
        tokenizer = from_pretrained(name, *args, **options)
        if ".model.partial" in str(name):
            tokenizer.add_tokens(["to"])
        return tokenizer

    monkeypatch.setattr(comparison.transformers.AutoTokenizer, "from_pretrained", other)
    ended = pretrain(max_steps=1)
    assert ended.status == 2
    assert "would not be what was trained: its tokenizer reads" in ended.error
    assert not (ended.folder / "model").exists()


@pytest.fixture
def no_memory(monkeypatch):
    free = SimpleNamespace(available=1000)
    monkeypatch.setattr(comparison.psutil, "virtual_memory", lambda: free)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_memory_for_a_second_model_its_tensors_are_compared(
    dtype, pretrain, run_export, no_memory, tmp_path
):
    ended = pretrain(max_steps=1)
    assert ended.status == 0
    (source,) = checkpoints(ended.folder)
    words = ("--checkpoint", source, "--output_dir", tmp_path / "out", "--dtype", dtype)
    status, output, _ = run_export(*words)
    assert status == 0
    warning = "were not compared: a second model needs 0.0 GiB of memory. "
    for written in (ended.output, output):
        assert warning + "Its tensors are those of the run\n" in written


def test_what_transformers_rewrites_is_counted_and_named(pretrain, no_memory):
    """Experts are one tensor in its models, and one each in its files."""
    ended = pretrain(max_steps=1, model=MIXTRAL)
    assert ended.status == 0, ended.error
    (line,) = (line for line in ended.output.splitlines() if "were not compared" in line)
    assert "of the run, but for 6 that transformers rewrites: " in line
    assert "model.layers.0.mlp.experts.gate_up_proj, " in line


@pytest.mark.parametrize("size", [1, 2])
def test_a_tensor_that_is_written_with_other_numbers_is_refused(
    size, pretrain, no_memory, monkeypatch
):
    """A single number in its last place, which no logits would show."""
    save_pretrained = PreTrainedModel.save_pretrained
    name = "model.layers.1.input_layernorm.weight"

    def save(model, folder, **options):
        save_pretrained(model, folder, max_shard_size=f"{size * 10}KB", **options)
        (file,) = (f for f in folder.glob("*.safetensors") if name in load_file(f))
        tensors = load_file(file)
        tensors[name][3] = tensors[name][3].nextafter(torch.tensor(2.0))
        save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    ended = pretrain(max_steps=1)
    assert ended.status == 2
    assert f"would not be what was trained: {name} has other numbers" in ended.error
    assert not (ended.folder / "model").exists()


def test_what_reading_changes_is_refused(pretrain, monkeypatch):
    from_pretrained = LlamaForCausalLM.from_pretrained.__func__

    def read(cls, *args, **options):
        model = from_pretrained(cls, *args, **options)
        model.model.norm.weight.data[0] += 1e-6
        return model

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(read))
    ended = pretrain(max_steps=1)
    assert ended.status == 2
    assert "would not be what was trained: model.norm.weight has other numbers" in ended.error


def test_a_run_whose_checkpoints_hold_no_constants_goes_on(pretrain):
    """As they were written once: buffers, and a router's bias, are what the model begins with."""
    whole = pretrain("whole", max_steps=4, save_steps=2)
    ended = pretrain("part", max_steps=2, save_steps=2)
    (source,) = checkpoints(ended.folder)
    older = state(source)
    for name in ("constants.safetensors", "reference.safetensors"):
        older["files"].pop(name, None)
        (source / name).unlink(missing_ok=True)
    write_state(source, older)
    shutil.rmtree(ended.folder / "model")
    ended = pretrain("part", max_steps=4, save_steps=2)
    assert ended.status == 0, ended.error
    weights = [(e.folder / "model/model.safetensors").read_bytes() for e in (whole, ended)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("precision", ["bf16"])
def test_rounding_alone_is_no_difference(precision, pretrain):
    ended = pretrain(max_steps=3, mixed_precision=precision)
    assert ended.status == 0, ended.error
    assert AutoModelForCausalLM.from_pretrained(ended.folder / "model").dtype == torch.bfloat16


# what no gradient changes

ERNIE = TINY_RUN["model"] | {
    "model_type": "ernie4_5_moe",
    "num_key_value_heads": 2,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 32,
    "moe_num_shared_experts": 1,
    "router_aux_loss_coef": 0.0,
}
ROFORMER = TINY_BERT["model"] | {"model_type": "roformer", "embedding_size": 32}


def test_parameters_that_need_no_gradient_leave_with_the_others(pretrain, pretrain_bert):
    """Of a router a bias that is no weight, and sinusoids: neither is in an optimizer."""
    ended = pretrain("ernie", max_steps=2, model=ERNIE)
    assert ended.status == 0, ended.error
    names = load_file(checkpoints(ended.folder)[-1] / "constants.safetensors").keys()
    assert any("correction_bias" in name for name in names)
    settings = {"model": ROFORMER, "packing": False, "objective": "mlm"}
    ended = pretrain_bert("roformer", max_steps=2, **settings)
    assert ended.status == 0, ended.error
    model = AutoModelForMaskedLM.from_pretrained(ended.folder / "model")
    sinusoids = "roformer.encoder.embed_positions.weight"
    held = load_file(checkpoints(ended.folder)[-1] / "constants.safetensors")[sinusoids]
    assert torch.equal(model.get_parameter(sinusoids), held)
    assert pretrain_bert("roformer", max_steps=3, **settings).status == 0


def test_settings_of_generation_that_came_with_a_model_leave_with_it(pretrain, tmp_path):
    """Also such as transformers itself refuses to save: a temperature that nothing draws with."""
    first = pretrain("first", max_steps=1)
    given = first.folder / "model"
    settings = {
        "temperature": 0.6,
        "do_sample": False,
        "repetition_penalty": 1.2,
        "eos_token_id": 2,
    }
    (given / "generation_config.json").write_text(json.dumps(settings))
    ended = pretrain("more", max_steps=2, model_name_or_path=str(given), model={})
    assert ended.status == 0, ended.error
    found = json.loads((ended.folder / "model/generation_config.json").read_text())
    assert {name: found[name] for name in settings} == settings
    assert not found.get("do_sample", False)
