"""recipes/causal_lm/generate.py --chat true: lines on stdin, answers with all that was said."""

import io
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
)

from conftest import write_jsonl
from launching import TINY_RUN, command_line
from recipes.causal_lm import finetune, generate

CHAT = ["<|im_start|>", "<|im_end|>"]
CHATML = (Path(finetune.__file__).parent / "chat_templates/chatml.jinja").read_text()
SHAPE = {key: value for key, value in TINY_RUN["model"].items() if key != "model_type"}


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory) -> Path:
    """A random model with ChatML, whose answers end by their limit as a rule."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(CHAT, special_tokens=True)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | settings, initializer_range=0.3))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def talk(call, folder, monkeypatch, tmp_path):
    """talk(*lines, **settings) → (how it ended, the prompts that the model was given)."""

    def start(*lines: str, **settings):
        prompts, original = [], GenerationMixin.generate

        def noted(model, inputs=None, **options):
            if inputs is not None:  # else a draft
                prompts.append(inputs[0].tolist())
            return original(model, inputs, **options)

        given = {"model_name_or_path": folder, "chat": True, "max_new_tokens": 8} | settings
        with monkeypatch.context() as patch:
            patch.setattr(GenerationMixin, "generate", noted)
            patch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
            return call(generate.main, command_line(given), tmp_path), prompts

    return start


def said(folder, messages: list[dict], max_new_tokens: int = 8) -> tuple[list[int], str]:
    """The prompt, and the answer by `generate` alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end_of_text|>"])
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    (sequence,) = model.generate(torch.tensor([ids]), generation_config=settings).tolist()
    return ids, tokenizer.decode(sequence[len(ids) :], skip_special_tokens=True)


def turns(*texts: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_each_answer_knows_what_was_said_before(talk, folder):
    system = [{"role": "system", "content": "Be brief."}]
    ended, prompts = talk("ka?", "", "mi?", system_prompt="Be brief.")
    assert ended.status == 0
    first, answer = said(folder, [*system, *turns("ka?")])
    second, last = said(folder, [*system, *turns("ka?", answer.strip(), "mi?")])
    assert prompts == [first, second]
    assert ended.output == f"{answer}\n{last}\n"
    assert ended.error.endswith("(cut off: max_new_tokens is 8)\n")


def test_reset_begins_anew_and_a_full_context_says_so(talk, folder):
    long = "ka to mi ren " * 20
    ended, prompts = talk("ka?", long, "/reset", "ka?")
    assert ended.status == 0
    assert prompts[0] == prompts[1] == said(folder, turns("ka?"))[0]
    assert len(prompts) == 2
    assert "(the context is full: " in ended.error
    assert "of 128 tokens; /reset begins anew)" in ended.error
    ended, prompts = talk("ka?", max_new_tokens=1000)
    assert ended.error.endswith(
        "(cut off: the context of 128 tokens is full; /reset begins anew)\n"
    )


def test_an_assistant_that_drafts_changes_no_answer(talk, folder):
    alone, _ = talk("ka?", "mi?")
    drafted, _ = talk("ka?", "mi?", assistant_model_name_or_path=folder)
    assert drafted.output == alone.output


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}])
def test_a_model_that_was_fine_tuned_answers(call, talk, folder, tmp_path, lora):
    """An adapter's folder names its base; its own template and ends hold."""
    base = folder
    rows = [{"prompt": f"{word}?", "completion": word.upper()} for word in ("ka", "to")]
    settings = {
        "output_dir": tmp_path / "run",
        "model_name_or_path": base,
        "train_data": [{"path": write_jsonl(tmp_path / "words.jsonl", rows)}],
        "lora": lora,
        "sequence_length": 128,
        "global_batch_size": 2,
        "learning_rate": 1e-2 if lora is None else 5e-2,
        "max_steps": 40,
        "save_steps": 40,
        "report_to": [],
    }
    trained = call(finetune.main, command_line(settings), tmp_path / "run")
    assert trained.status == 0, trained.error
    ended, _ = talk("ka?", "to?", "/reset", "to?", model_name_or_path=tmp_path / "run" / "model")
    answers = ended.output.splitlines()
    assert (ended.status, answers[0], answers[-1]) == (0, "KA", "TO")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "x"}, "prompt: a chat is read from the terminal: leave it out"),
        ({"num_beams": 2}, "chat: it has one answer: leave num_beams and num_return_sequences"),
        (
            {"chat": False, "prompt": "x", "system_prompt": "y"},
            "system_prompt: it is for a convers",
        ),
        ({"chat": False}, "there is nothing to continue: give prompt, prompt_file or chat"),
        ({"chat_template": "none"}, "chat_template: there is no none; there are chatml, llama3, "),
    ],
)
def test_settings_that_are_refused(talk, settings, message):
    ended, _ = talk("ka?", **settings)
    assert ended.status == 2
    assert ended.error.splitlines()[-1].startswith(f"error: {message}")


def test_a_model_without_a_template_says_what_to_do(talk, folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    ended, _ = talk("ka?", model_name_or_path=tmp_path / "plain")
    assert ended.status == 2
    assert ended.error.splitlines()[-1] == (
        f"error: chat_template: the tokenizer {tmp_path / 'plain'} has none: give one of chatml, "
        "llama3, plain, or a jinja file"
    )
    ended, prompts = talk("ka?", model_name_or_path=tmp_path / "plain", chat_template="chatml")
    assert prompts == [said(folder, turns("ka?"))[0]]


def test_what_the_template_refuses_is_told(talk, tmp_path):
    system = "{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
    (tmp_path / "own.jinja").write_text(system + CHATML)
    settings = {"chat_template": tmp_path / "own.jinja", "system_prompt": "Be brief."}
    ended, _ = talk("ka?", **settings)
    assert ended.status == 2
    assert "chat_template: it cannot write the conversation: No system!" in ended.error


def press(*_, **__):
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_ends_it_in_an_answer_and_between_two(talk, monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which processes of pytest-xdist ignore
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", press)
        ended, _ = talk("ka?")
    assert (ended.status, ended.output) == (130, "\n")
    monkeypatch.setattr("builtins.input", press)
    ended, prompts = talk("ka?")
    assert (ended.status, ended.output, prompts) == (130, "\n", [])
    assert "Traceback" not in ended.error


def test_what_is_no_text_is_told(talk, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: "ka \udcff")
    ended, _ = talk()
    assert ended.status == 2
    assert ended.error.endswith("error: what was typed is not Unicode\n")
