"""Texts that a model writes while it is trained: in batches, in shares, up to its positions."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from utils.scoring import generate_texts

SIZES = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SAMPLED = {"do_sample": True, "temperature": 0.8}


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=2, max_position_embeddings=24)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=512,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        initializer_factor=5.0,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return T5ForConditionalGeneration(config).eval()


def one_of(world_size: int, rank: int, model: PreTrainedModel, gather: Callable) -> Any:
    """What `generate_texts` needs of a `Training`."""
    ranks = SimpleNamespace(
        rank=rank,
        world_size=world_size,
        stopped=False,
        any_rank=lambda mine: mine,
        gather=gather,
    )
    accelerator = SimpleNamespace(autocast=nullcontext, device=torch.device("cpu"))
    engine = SimpleNamespace(whole_root=nullcontext)
    return SimpleNamespace(ranks=ranks, accelerator=accelerator, objective=model, engine=engine)


@pytest.fixture
def write(tokenizer, monkeypatch):
    """write(model, prompts, …): the texts, by as many ranks in turn, and the calls of each rank."""

    def texts(model: PreTrainedModel, prompts: list, *given, world_size: int = 1, **options):
        gathered: list[tuple] = []
        calls: list[list[dict]] = []
        found = None
        generate = type(model).generate

        def spy(*args, **kwargs):
            calls[-1].append({"input_ids": args[1], **kwargs})
            return generate(*args, **{**kwargs, "synced_gpus": False})

        for rank in range(world_size):

            def gather(mine: list) -> list:
                gathered.extend(mine)
                return gathered

            calls.append([])
            with monkeypatch.context() as patch:
                patch.setattr(type(model), "generate", spy)
                training = one_of(world_size, rank, model, gather)
                found = generate_texts(training, model, tokenizer, prompts, *given, **options)
        return found, calls

    return texts


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_text_does_not_depend_on_the_prompts_beside_it(kind, write, request, tokenizer):
    model = request.getfixturevalue(kind)
    alone, calls = write(model, PROMPTS, 8, do_sample=False)
    assert [len(call["input_ids"]) for call in calls[0]] == [1] * 4
    for text, prompt in zip(alone, PROMPTS, strict=True):
        tokens = torch.tensor([prompt])
        mask, end = torch.ones_like(tokens), tokenizer.eos_token_id
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": end}
        written = model.generate(tokens, attention_mask=mask, pad_token_id=end, **options)[0]
        if kind == "llama":
            written = written[len(prompt) :]
        assert text == tokenizer.decode(written, skip_special_tokens=True) != ""
    together, ((call,),) = write(model, PROMPTS, 8, 4, do_sample=False)
    assert together == alone
    # the longest first; a decoder goes on where its prompt ends
    for tokens, mask, index in zip(
        call["input_ids"], call["attention_mask"].bool(), (2, 0, 3, 1), strict=True
    ):
        assert tokens[mask].tolist() == PROMPTS[index]
        assert mask.tolist() == sorted(mask.tolist(), reverse=kind == "t5")


@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
def test_every_number_of_ranks_writes_the_same_in_as_many_calls(options, llama, write):
    alone, _ = write(llama, PROMPTS[:3], 8, **options)
    assert len(set(alone)) == 3
    for world_size in (2, 4):
        texts, calls = write(llama, PROMPTS[:3], 8, world_size=world_size, **options)
        assert texts == alone
        # ZeRO-3 waits for the rank that calls the model less often
        assert {len(of_rank) for of_rank in calls} == {-(-3 // world_size)}
        assert all(call["synced_gpus"] for of_rank in calls for call in of_rank)


def test_what_is_drawn_is_drawn_anew_for_each_prompt(llama, write):
    (first, second, third), _ = write(llama, [PROMPTS[0]] * 2 + [PROMPTS[1]], 8, **SAMPLED)
    assert first == second != third
    greedy, _ = write(llama, PROMPTS[:1], 8, do_sample=False)
    assert greedy != [first]


def test_a_decoder_writes_up_to_its_last_position(llama, write):
    prompts = [list(range(5, 5 + length)) for length in (23, 20, 8)]
    _, (calls,) = write(llama, prompts, 10, do_sample=False)
    assert [call["max_new_tokens"] for call in calls] == [1, 4, 10]


def test_nothing_to_write(llama, write):
    assert write(llama, [], 8, world_size=2)[0] == []


def test_a_stop_signal_ends_it(llama, tokenizer):
    calls = []
    training = one_of(1, 0, llama, list)

    def any_rank(_: bool) -> bool:
        calls.append(None)
        training.ranks.stopped = len(calls) == 2
        return False

    training.ranks.any_rank = any_rank
    assert generate_texts(training, llama, tokenizer, PROMPTS, 8) is None
    assert len(calls) == 2
