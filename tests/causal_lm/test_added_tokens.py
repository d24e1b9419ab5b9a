"""Tokens that a template needs and a given model lacks: embedded, trained, exported."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from added_tokens import embed_added_tokens
from conftest import write_jsonl
from launching import TINY_RUN, checkpoints, command_line
from recipes.causal_lm import distill, finetune

ADDED = ["<|im_start|>", "<|im_end|>"]


def base_model(size: int, **settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {key: value for key, value in TINY_RUN["model"].items() if key != "model_type"}
    return LlamaForCausalLM(LlamaConfig(**shape | {"vocab_size": size} | settings))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("room", [0, 100])
def test_added_tokens_begin_at_the_mean_of_the_others(tokenizer_folder, is_tied, room):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    held = len(tokenizer)
    model = base_model(held + room, tie_word_embeddings=is_tied)
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    before = [layer.weight.detach()[:held].clone() for layer in layers]
    tokenizer.add_tokens(ADDED, special_tokens=True)
    embed_added_tokens(model, tokenizer, ADDED)
    assert model.config.vocab_size == (held + room if room else -(-(held + 2) // 64) * 64)
    for old, layer in zip(
        before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True
    ):
        assert torch.equal(layer.weight[:held], old)
        assert torch.allclose(layer.weight[held:], old.mean(0), atol=1e-7)
    same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert same == is_tied
    with torch.no_grad():
        size = model(torch.tensor([[held, held + 1]])).logits.shape[-1]
    assert size == model.config.vocab_size


@pytest.fixture
def instruct(call, tokenizer_folder, tmp_path):
    """instruct(name, main, **settings): a recipe on a base model without tokens for turns."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    base_model(len(tokenizer), max_position_embeddings=256).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"{word}?", "completion": word.upper()} for word in ("ka", "to", "mi")]
    given = {
        "model_name_or_path": tmp_path / "base",
        "train_data": [{"path": write_jsonl(tmp_path / "words.jsonl", rows)}],
        "chat_template": "chatml",
        "add_tokens": ADDED,
        "sequence_length": 256,
        "global_batch_size": 3,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "save_steps": 2,
        "report_to": [],
    }

    def start(name: str = "run", main=finetune.main, **settings):
        words = command_line({"output_dir": tmp_path / name} | given | settings)
        return call(main, words, tmp_path / name)

    return start


def weight_of(folder) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach()


def test_they_are_trained_and_exported_and_the_run_goes_on(instruct, tmp_path):
    ended = instruct()
    assert ended.status == 0, ended.error
    exported = tmp_path / "run" / "model"
    tokenizer, held = AutoTokenizer.from_pretrained(exported), weight_of(tmp_path / "base")
    start, end = tokenizer.convert_tokens_to_ids(ADDED)
    assert (start, end) == (len(held), len(held) + 1)
    learnt = weight_of(exported)
    assert len(learnt) == -(-len(tokenizer) // 64) * 64
    for token in (start, end):
        assert not torch.allclose(learnt[token], held.mean(0), atol=1e-3)
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert end in model.generation_config.eos_token_id
    # continued from its middle; a second stage from what was exported
    shutil.rmtree(exported)
    (ended.folder / "finished.json").unlink()
    shutil.rmtree(checkpoints(ended.folder)[-1])
    assert "continuing" in instruct().output
    assert torch.equal(weight_of(exported), learnt)
    again = instruct("again", model_name_or_path=exported)
    assert again.status == 0, again.error
    assert len(weight_of(again.folder / "model")) == len(learnt)


def test_a_tokenizer_may_have_them_already(instruct, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(ADDED, special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "grown")
    ended = instruct(tokenizer=tmp_path / "grown", max_steps=1)
    assert ended.status == 0, ended.error
    learnt, held = weight_of(ended.folder / "model"), weight_of(tmp_path / "base")
    assert torch.allclose(learnt[len(held)], held.mean(0), atol=0.02)
    ended = instruct("adapter", tokenizer=tmp_path / "grown", lora={"r": 2})
    assert "add_tokens: <|im_start|> needs an embedding that is trained" in ended.error
    ended = instruct("other", tokenizer=tmp_path / "grown", add_tokens=[])
    assert "model.vocab_size: 512 is less than the tokenizer's 514 tokens" in ended.error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"add_tokens": []}, "suits it, or set add_tokens: [<|im_end|>, <|im_start|>]"),
        ({"add_tokens": [" "]}, "add_tokens: a token of blanks is none"),
        ({"lora": {"r": 2}}, "add_tokens: <|im_start|> needs an embedding that is trained"),
        ({"freeze": "embeddings"}, "exported with the model: leave out freeze, or choose a chat_"),
    ],
)
def test_tokens_that_are_refused(instruct, settings, message):
    ended = instruct(**settings)
    assert ended.status == 2
    assert message in ended.error
    assert not ended.folder.exists()


def test_a_teacher_does_not_know_them(instruct, tmp_path):
    ended = instruct(main=distill.main, teacher={"model_name_or_path": str(tmp_path / "base")})
    assert ended.status == 2
    assert "add_tokens: the teacher knows no <|im_start|>: add it to the teacher" in ended.error
