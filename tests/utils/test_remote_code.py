"""Code that comes with a model or a tokenizer runs where it is trusted, and nowhere else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from comparing import assert_same_run, copy_before_its_end, run_code_of_card
from launching import checkpoints, command_line
from recipes.causal_lm import finetune, generate
from utils import export
from utils.config import InputError

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
{relative}
Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 512}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch) -> Path:
    """It stands once the code has run. What asks is told "yes"."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return tmp_path / "it-ran"


@pytest.fixture
def own(tmp_path: Path, tokenizer_folder: Path, marker: Path) -> Path:
    """A model of its own type, and its tokenizer of its own class."""
    folder = tmp_path / "own"
    config = transformers.LlamaConfig(num_attention_heads=2, **SIZES)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    relative = "from .own_parts import PART"
    (folder / "modeling_own.py").write_text(CODE.format(marker=str(marker), relative=relative))
    (folder / "own_parts.py").write_text("PART = 1\n")
    edit(
        folder / "config.json",
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    )
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "modeling_own.OwnTokenizer"]},
    )
    return folder


def edit(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


NEEDED = "needs code of its own (modeling_own.py, own_parts.py): it is run only with "


@pytest.mark.parametrize("name", ["model_name_or_path", "tokenizer"])
def test_code_is_refused_before_anything_is_written(name, own, marker, pretrain):
    more = {} if name == "tokenizer" else {"model": {}}
    ended = pretrain(max_steps=1, **{name: str(own)}, **more)
    assert (ended.status, ended.folder.exists(), marker.exists()) == (2, False, False)
    assert ended.error == f"error: {own} {NEEDED}trust_remote_code: true\n"


def test_generate_refuses_code(own, marker, call, tmp_path):
    words = ["--model_name_or_path", str(own), "--prompt", "a"]
    ended = call(generate.main, words, tmp_path)
    assert (ended.status, marker.exists()) == (2, False)
    assert ended.error == f"error: {own} {NEEDED}trust_remote_code: true\n"


def test_a_known_type_is_read_with_the_code_of_transformers(own, marker, pretrain, call, tmp_path):
    """And what leaves does not name code that is not there."""
    edit(own / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    edit(own / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (own / "custom_generate").mkdir()
    (own / "custom_generate" / "generate.py").write_text(f"open({str(marker)!r}, 'w')")
    ended = pretrain(max_steps=2, model_name_or_path=str(own), model={})
    assert ended.status == 0, ended.error
    words = ["--model_name_or_path", str(own), "--prompt", "a"]
    assert call(generate.main, words, tmp_path).status == 0
    assert not marker.exists()
    for folder in (ended.folder / "model", checkpoints(ended.folder)[-1]):
        for name in ("config.json", "tokenizer_config.json"):
            assert "auto_map" not in json.loads((folder / name).read_text())


def test_trusted_code_goes_the_whole_road(own, marker, pretrain, call, tmp_path):
    settings = {"model_name_or_path": str(own), "model": {}, "trust_remote_code": True}
    whole = pretrain("whole", max_steps=4, save_steps=2, tokenizer=str(own), **settings)
    assert whole.status == 0, whole.error
    assert marker.exists()
    assert "not compared" not in whole.output
    checkpoint, model = checkpoints(whole.folder)[-1], whole.folder / "model"
    for folder in (checkpoint, model):
        assert (folder / "modeling_own.py").read_text() == (own / "modeling_own.py").read_text()
        assert (folder / "own_parts.py").exists()
    client = transformers.AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    assert type(client).__name__ == "OwnForCausalLM"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizer"
    run_code_of_card(whole.folder)

    (whole.folder / "predictions.jsonl").touch()
    copy_before_its_end(whole.folder, tmp_path / "resumed")
    resumed = pretrain("resumed", max_steps=4, save_steps=2, tokenizer=str(own), **settings)
    assert resumed.status == 0, resumed.error
    assert_same_run(resumed.folder, whole.folder)

    marker.unlink()
    shutil.rmtree(own)  # the checkpoint is enough
    with pytest.raises(InputError, match="it is run only with trust_remote_code: true"):
        export.export(checkpoint, tmp_path / "refused")
    assert not marker.exists()
    export.export(checkpoint, tmp_path / "again", trust_remote_code=True)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True
    )
    for name, value in client.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    words = ["--model_name_or_path", str(tmp_path / "again"), "--prompt", "a"]
    assert call(generate.main, [*words, "--trust_remote_code", "true"], tmp_path).status == 0


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_on_trusted_code(merge, own, marker, call, tmp_path):
    rows = [{"prompt": "what", "completion": "this"} for _ in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "output_dir": tmp_path / "run",
        "model_name_or_path": str(own),
        "train_data": [{"path": str(tmp_path / "rows.jsonl")}],
        "chat_template": "plain",
        "lora": {"r": 2},
        "merge_adapter": merge,
        "max_steps": 2,
        "sequence_length": 64,
        "global_batch_size": 4,
        "per_device_batch_size": 4,
        "report_to": [],
    }
    refused = call(finetune.main, command_line(settings), tmp_path / "run")
    assert (refused.status, marker.exists()) == (2, False)
    words = command_line({**settings, "trust_remote_code": True})
    ended = call(finetune.main, words, tmp_path / "run")
    assert ended.status == 0, ended.error
    model = transformers.AutoModelForCausalLM.from_pretrained(
        ended.folder / "model", trust_remote_code=True
    )
    assert type(model).__name__ == "OwnForCausalLM"
    assert any("lora_" in name for name, _ in model.named_parameters()) != merge
    run_code_of_card(ended.folder)
    words = ["--model_name_or_path", str(ended.folder / "model"), "--prompt", "a"]
    marker.unlink()
    assert call(generate.main, words, tmp_path).status == 2
    assert not marker.exists()
    assert call(generate.main, [*words, "--trust_remote_code", "true"], tmp_path).status == 0


def test_a_plan_of_trusted_code(own, marker, pretrain):
    settings = {"model_name_or_path": str(own), "model": {}, "trust_remote_code": True}
    ended = pretrain(tokenizer=str(own), max_steps=1, dry_run=True, **settings)
    assert ended.status == 0, ended.error


def test_a_model_from_scratch_names_no_code(marker, pretrain):
    code = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    ended = pretrain(max_steps=1, **{"model.auto_map": code})
    assert ended.status == 2
    assert "model: llama has no setting 'auto_map'" in ended.error


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin"])
def test_generate_refuses_pickles(file, own, call, tmp_path):
    edit(own / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    edit(own / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (own / file).write_bytes((own / "model.safetensors").read_bytes())
    if file == "pytorch_model.bin":
        (own / "model.safetensors").unlink()
    words = ["--model_name_or_path", str(own), "--prompt", "a"]
    ended = call(generate.main, words, tmp_path)
    assert ended.status == 2
    assert f"has no weights but pickled ones ({file})" in ended.error


def test_workers_know_a_tokenizer_of_trusted_code(own, marker, pretrain):
    settings = {"model_name_or_path": str(own), "model": {}, "trust_remote_code": True}
    ended = pretrain(max_steps=2, tokenizer=str(own), dataloader_num_workers=1, **settings)
    assert ended.status == 0, ended.error
