"""What is no tokenizer, and what are no weights: one line, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from utils.config import InputError
from utils.model import ModelArguments, load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 123\n"
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def to_bin(file: Path) -> Path:
    other = file.with_name("pytorch_model.bin")
    torch.save(load_file(file), other)
    file.unlink()
    return other


WEIGHTS = {
    "a pointer of LFS": (lambda f: f.write_text(POINTER), "run git lfs pull"),
    "empty": (lambda f: f.write_bytes(b""), "header too small"),
    "cut short": (cut, "incomplete metadata"),
    "some JSON": (lambda f: f.write_text("{}"), "header too small"),
    "noise": (lambda f: f.write_bytes(bytes(range(256)) * 99), "header too large"),
    "none": (Path.unlink, "no file named model.safetensors"),
}


@pytest.fixture
def folder(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_attention_heads=2, **SIZES))
    model.save_pretrained(tmp_path / "given")
    return tmp_path / "given"


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_none_are_refused_before_anything_is_written(kind, folder, pretrain):
    damage, problem = WEIGHTS[kind]
    damage(folder / "model.safetensors")
    ended = pretrain(max_steps=1, model_name_or_path=str(folder), model={})
    assert ended.status == 2
    assert ended.error.startswith(f"error: model_name_or_path: cannot load {folder}: ")
    assert problem in ended.error
    assert ended.error.count("\n") == 1
    assert not ended.folder.exists()


PICKLED = {
    "whole": to_bin,
    "in parts": lambda f: to_bin(f).rename(f.with_name("pytorch_model-00001-of-00002.bin")),
    "cut short": lambda f: cut(to_bin(f)),
    "a pointer of LFS": lambda f: to_bin(f).write_text(POINTER),
}


@pytest.mark.parametrize("kind", PICKLED)
def test_pickled_weights_are_refused_with_what_converts_them(kind, folder, pretrain):
    expected = LlamaForCausalLM.from_pretrained(folder).state_dict()
    PICKLED[kind](folder / "model.safetensors")
    ended = pretrain(max_steps=1, model_name_or_path=str(folder), model={})
    assert (ended.status, ended.folder.exists()) == (2, False)
    assert ended.error.startswith(f"error: {folder} has no weights but pickled ones (pytorch_model")
    assert ended.error.count("\n") == 1
    if kind == "whole":  # what it says is Python, and does it
        exec(ended.error.rpartition("write safetensors: ")[2], {"transformers": transformers})
        for key, value in load_file(folder / "model.safetensors").items():
            assert torch.equal(value, expected[key])


def other_json(value: object) -> object:
    return lambda text: json.dumps(value)


TOKENIZERS = {
    "an object": other_json({"a": 1}),
    "a list": other_json([]),
    "a number": other_json(3),
    "null": other_json(None),
    "its vocabulary": lambda text: json.dumps(json.loads(text)["model"]["vocab"]),
    "a model's config": other_json({"model_type": "llama"}),
    "without a model": lambda text: json.dumps({**json.loads(text), "model": None}),
    "cut short": lambda text: text[:3000],
    "empty": lambda text: "",
    "a pointer of LFS": lambda text: POINTER,
    "no words": lambda text: json.dumps(without_words(json.loads(text))),
}


def without_words(tokenizer: dict) -> dict:
    return {**tokenizer, "model": {**tokenizer["model"], "vocab": {}, "merges": []}}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_json_of_another_kind_is_refused(kind, tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path / "given")
    file = tmp_path / "given/tokenizer.json"
    file.write_text(TOKENIZERS[kind](file.read_text()))
    arguments = ModelArguments(tokenizer=str(tmp_path / "given"))
    with pytest.raises(InputError, match=r"^tokenizer: .*given") as error:
        load_tokenizer(arguments)
    assert "\n" not in str(error.value)
    expected = {"a pointer of LFS": "run git lfs pull", "no words": "has no vocabulary"}
    assert expected.get(kind, "cannot load") in str(error.value)


def test_a_folder_without_a_vocabulary_is_no_tokenizer(wordpiece_folder, tmp_path):
    """transformers makes one of its special tokens alone."""
    shutil.copytree(wordpiece_folder, tmp_path / "given")
    (tmp_path / "given/tokenizer.json").unlink()
    arguments = ModelArguments(model_name_or_path=str(tmp_path / "given"))
    with pytest.raises(InputError, match="has no vocabulary: special tokens are all it knows"):
        load_tokenizer(arguments)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_5", "llama", "bert", "phi3"])
def test_texts_are_read_as_they_will_be_where_the_export_is(
    kind, tokenizer_folder, tmp_path, capsys
):
    """Of a Qwen2 model transformers reads any tokenizer as Qwen2Tokenizer."""
    text = "The 12345 words, né e\u0301:\n\n    x = 1 \n"
    tokenizer = load_tokenizer(
        ModelArguments(tokenizer=str(tokenizer_folder), model={"model_type": kind})
    )
    for part in (AutoConfig.for_model(kind), tokenizer):
        part.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == tokenizer.encode(text)
    own = AutoTokenizer.from_pretrained(tokenizer_folder).encode(text)
    said = f"{tokenizer_folder} is read as {type(tokenizer).__name__}, as transformers does"
    assert (said in capsys.readouterr().out) == (tokenizer.encode(text) != own)


def test_a_tokenizer_of_which_transformers_makes_another_is_refused(wordpiece_folder):
    arguments = ModelArguments(tokenizer=str(wordpiece_folder), model={"model_type": "qwen2"})
    with pytest.raises(InputError, match="as Qwen2Tokenizer, which loses text"):
        load_tokenizer(arguments)
