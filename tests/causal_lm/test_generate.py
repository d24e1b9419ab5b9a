"""recipes/causal_lm/generate.py against hand-written decoding loops, with tiny random models."""

import copy
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    PreTrainedTokenizerFast,
    pipeline,
    set_seed,
)

import programs
from programs import ROOT, documented_commands
from recipes.causal_lm import generate
from utils.config import InputError, parse

PROGRAM = "recipes/causal_lm/generate.py"
BEGIN, END, VOCABULARY = 0, 1, 300
PROMPTS = ["def ", "", "class A:\n    pass", "naïve ☃ café", "return 0 " * 5]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small are faster without a pool of threads, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(folder: Path, family: str = "llama", **changes) -> Path:
    """A random model whose greedy texts differ from prompt to prompt and do not loop at once."""
    set_seed(3)
    if family == "llama":
        config = LlamaConfig(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "initializer_range": 0.3,
                "bos_token_id": BEGIN,
                "eos_token_id": END,
                **changes,
            }
        )
    else:
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            initializer_range=0.3,
            bos_token_id=BEGIN,
            eos_token_id=END,
        )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_tokenizer(
    folder: Path, begin: bool = True, end: bool = True, template: bool | str = False
):
    """Byte-level BPE; `template` adds the begin token as the post-processors of many models do, or
    is such a template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def main(): return 0", "class A: pass"] * 10, trainer)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A" if template is True else template,
            special_tokens=[("<|begin|>", BEGIN), ("<|end|>", END)],
        )
    special = {"bos_token": "<|begin|>"} if begin else {}
    special |= {"eos_token": "<|end|>"} if end else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("llama"))
    make_tokenizer(folder, template=True)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Call the recipe with options by name; returns its rows and keeps the sequences it made."""
    interrupt_handler = signal.getsignal(signal.SIGINT)
    original = GenerationMixin.generate

    def run(**options) -> list[dict[str, str]]:
        run.sequences, run.inputs = [], []

        def keep(self, input_ids, **kwargs):
            mask = kwargs.get("attention_mask")
            run.inputs.append((input_ids.tolist(), None if mask is None else mask.tolist()))
            sequences = original(self, input_ids, **kwargs)
            if not torch.is_tensor(sequences):  # of an assistant
                return sequences
            run.sequences += sequences.tolist()
            return sequences

        monkeypatch.setattr(GenerationMixin, "generate", keep)
        prompts = options.pop("prompt", None)
        if isinstance(prompts, list):
            options["prompt_file"] = str(tmp_path / "prompts.jsonl")
            lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
            (tmp_path / "prompts.jsonl").write_text("".join(lines))
        elif prompts is not None:
            options["prompt"] = prompts
        output = tmp_path / "texts.jsonl"
        options = {"model_name_or_path": folder, "output_file": output, **options}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["generate.py", *words])
        generate.main()
        return [json.loads(line) for line in output.read_text().split("\n")[:-1]]

    yield run
    signal.signal(signal.SIGINT, interrupt_handler)


def greedy(tokenizer, model, prompt: str, max_new_tokens: int, penalty: float = 1.0) -> list[int]:
    """Argmax over full forward passes, one prompt, no cache; the penalty as CTRL defines it."""
    ids = [BEGIN, *tokenizer(prompt, add_special_tokens=False).input_ids]
    start = len(ids)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, -1]
        for seen in set(ids):
            scores[seen] = scores[seen] / penalty if scores[seen] > 0 else scores[seen] * penalty
        ids.append(int(scores.argmax()))
        if ids[-1] == END:
            break
    return ids[start:]


def mean_log_probability(model, sequence: list[int], start: int) -> float:
    """Per token from `start` to the end token: what beam search ranks by."""
    if END in sequence[start:]:
        sequence = sequence[: sequence.index(END, start) + 1]
    with torch.no_grad():
        scores = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
    places = range(start, len(sequence))
    return sum(float(scores[place - 1, sequence[place]]) for place in places) / len(places)


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_is_the_argmax_of_full_forward_passes(run, loaded, penalty):
    tokenizer, model = loaded
    rows = run(prompt=PROMPTS, max_new_tokens=24, repetition_penalty=penalty)
    assert [row["prompt"] for row in rows] == PROMPTS
    expected = [greedy(tokenizer, model, prompt, 24, penalty) for prompt in PROMPTS]
    for row, ids in zip(rows, expected, strict=True):
        assert row["text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert len({row["text"] for row in rows}) == len(PROMPTS)
    if penalty == 1.0:
        assert expected != [greedy(tokenizer, model, prompt, 24, 1.7) for prompt in PROMPTS]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("begin", [True, False], ids=["bos", "no bos"])
def test_a_batch_gives_each_prompt_the_text_it_gets_alone(run, tmp_path, family, begin):
    folder = make_model(tmp_path / family, family)
    make_tokenizer(folder, begin=begin, template=begin)
    options = {"model_name_or_path": folder, "max_new_tokens": 24, "repetition_penalty": 1.3}
    alone = run(prompt=PROMPTS, batch_size=1, **options)
    assert len({row["text"] for row in alone}) == len(PROMPTS)
    assert run(prompt=PROMPTS, batch_size=2, **options) == alone
    assert run(prompt=PROMPTS, batch_size=8, **options) == alone
    # where the repetition penalty takes padding for text, it must find nothing new there
    ((rows, masks),) = run.inputs
    for row, mask in zip(rows, masks, strict=True):
        start = mask.index(1)
        assert set(row[:start]) <= set(row[start:])


def test_sampling_is_a_function_of_the_seed(run):
    options = {"prompt": "def ", "temperature": 1.0, "num_return_sequences": 3}
    first = run(seed=1, **options)
    assert len({row["text"] for row in first}) == 3
    assert run(seed=1, **options) == first
    assert run(seed=2, **options) != first


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_the_narrowest_sampling_is_greedy(run, narrow):
    likeliest = run(prompt=PROMPTS, max_new_tokens=16)
    assert run(prompt=PROMPTS, max_new_tokens=16, **{"temperature": 2.0, **narrow}) == likeliest
    assert run(prompt=PROMPTS, max_new_tokens=16, temperature=2.0) != likeliest


def test_sampling_draws_from_all_tokens_unless_top_k_is_given(run):
    options = {"prompt": "def ", "max_new_tokens": 1, "num_return_sequences": 400}
    run(temperature=1000.0, **options)  # nearly uniform over the vocabulary
    assert len({sequence[-1] for sequence in run.sequences}) > 150
    run(temperature=1000.0, top_k=7, **options)
    assert len({sequence[-1] for sequence in run.sequences}) == 7


def test_beams_are_at_least_as_likely_as_greedy(run, loaded):
    _, model = loaded
    gains = []
    for prompt in PROMPTS:
        run(prompt=prompt, max_new_tokens=8)
        (likeliest,) = run.sequences
        rows = run(prompt=prompt, max_new_tokens=8, num_beams=6, num_return_sequences=3)
        assert len(rows) == 3
        assert len({tuple(sequence) for sequence in run.sequences}) == 3
        start = len(run.inputs[0][0][0])
        scores = [mean_log_probability(model, sequence, start) for sequence in run.sequences]
        assert scores == sorted(scores, reverse=True)
        gains.append(scores[0] - mean_log_probability(model, likeliest, start))
    assert min(gains) > -1e-6
    assert max(gains) > 0.01


def test_a_prompt_starts_as_the_tokenizer_begins_a_text(tmp_path, loaded):
    _, model = loaded

    def encode(text="def main", **tokenizer_options):
        tokenizer = make_tokenizer(tmp_path, **tokenizer_options)
        (ids,) = generate.encode(
            [("prompt 1", text)], AutoTokenizer.from_pretrained(tmp_path), model, 8
        )
        plain = tokenizer(text, add_special_tokens=False).input_ids
        assert ids[len(ids) - len(plain) :] == plain
        return ids[: len(ids) - len(plain)]

    assert encode() == []
    assert encode(template=True) == [BEGIN]
    assert encode("<|end|>", template=True) == [BEGIN]
    # nothing is continued after an end
    assert encode(template="<|begin|> $A <|end|>") == [BEGIN]
    assert encode("def <|end|>", template="$A <|end|>") == []
    # no text at all begins as well as it can
    assert encode("", template=True) == encode("") == [BEGIN]
    assert encode("", begin=False) == [END]
    with pytest.raises(InputError) as error:
        encode("", begin=False, end=False)
    assert (
        str(error.value) == "prompt 1: the tokenizer has no bos or eos token to begin a text with"
    )


@pytest.mark.parametrize(
    "options", [{}, {"begin": False}, {"template": True}, {"template": "$A <|end|>"}], ids=str
)
def test_what_the_recipes_have_trained_continues_as_in_a_pipeline(run, pretrain, tmp_path, options):
    folder = tmp_path / "tokenizer"
    tokenizer = make_tokenizer(folder, **options)
    ended = pretrain(tokenizer=folder, max_steps=1, sequence_length=32)
    assert ended.status == 0, ended.error
    model = ended.folder / "model"
    begin = BEGIN if options.get("begin", True) else END
    write = pipeline("text-generation", str(model), max_new_tokens=8, do_sample=False)
    for prompt in ("def ", " a<|end|> b", "né <|begin|>"):
        run(prompt=prompt, model_name_or_path=model, max_new_tokens=8)
        (sequence,) = run.sequences
        document = [begin, *tokenizer(prompt, add_special_tokens=False).input_ids]
        assert sequence[: len(document)] == document  # as in training
        (text,) = write(prompt, return_tensors=True)
        assert text["generated_token_ids"] == sequence


def test_generation_stops_at_the_end_token(run, tmp_path, loaded):
    tokenizer, model = loaded
    ids = greedy(tokenizer, model, "def ", 12)
    assert ids.index(ids[5]) == 5
    model.save_pretrained(tmp_path / "model")
    ending = make_tokenizer(tmp_path / "model", template=True)
    ending.eos_token = tokenizer.convert_ids_to_tokens(ids[5])
    ending.save_pretrained(tmp_path / "model")
    model_name_or_path = tmp_path / "model"
    rows = run(model_name_or_path=model_name_or_path, prompt=["def ", "A"], max_new_tokens=12)
    assert rows[0]["text"] == tokenizer.decode(ids[:5])
    start = len(run.inputs[0][0][0])
    assert run.sequences[0][start : start + 6] == ids[:6]


@pytest.mark.parametrize("beams", [1, 3])
def test_without_an_end_token_texts_are_as_long_as_asked(run, folder, tmp_path, loaded, beams):
    loaded[1].save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model", end=False)
    options = {"model_name_or_path": tmp_path / "model", "num_beams": beams}
    run(prompt=["def ", "class A"], max_new_tokens=12, **options)
    length = len(run.inputs[0][0][0]) + 12
    assert [len(sequence) for sequence in run.sequences] == [length, length]


def test_generation_config_of_the_model_counts_for_nothing(run, folder, tmp_path, loaded):
    tokenizer, model = loaded
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"do_sample": True, "max_length": 3, "eos_token_id": END, "no_repeat_ngram_size": 1}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(settings))
    options = {"prompt": PROMPTS, "max_new_tokens": 16}
    assert run(model_name_or_path=tmp_path / "model", **options) == run(**options)


def test_texts_end_where_the_model_says_and_the_tokenizer(loaded):
    tokenizer, model = loaded
    for given, ends in ((END, [END]), ([7, 9], [7, 9, END]), (None, [END])):
        model = copy.copy(model)
        model.generation_config = GenerationConfig(eos_token_id=given)
        assert generate.end_tokens(tokenizer, model) == ends


def make_word_tokenizer(folder: Path) -> None:
    """Words marked by the blank before them, as SentencePiece has them."""
    words = ["<s>", "</s>", "\n", *(f"▁w{n}" for n in range(25)), *(f"x{n}" for n in range(4))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BEGIN)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def test_the_stream_is_the_text(run, tmp_path, capsys, folder):
    words = make_model(tmp_path / "words", vocab_size=32)
    make_word_tokenizer(words)
    streamed = []
    for model in (folder, words):
        for seed in range(4):
            options = {"model_name_or_path": model, "temperature": 1.5, "seed": seed}
            (row,) = run(prompt="w1 w2", max_new_tokens=60, **options)
            assert capsys.readouterr().out == f"w1 w2{row['text']}\n"
            streamed.append(row["text"])
    # what is hard in it: characters of several tokens, and blanks where a text or a line begins
    assert any(re.search("[\u0080-\ufffc]", text) for text in streamed[:4])
    assert any(text.startswith(" ") for text in streamed[4:])
    assert any("\n " in text for text in streamed[4:])


def test_the_stream_comes_token_by_token(run, monkeypatch):
    shown = []
    monkeypatch.setattr("builtins.print", lambda text, **_: shown.append(text))
    (row,) = run(prompt="def ", max_new_tokens=30)
    assert shown[0] == "def "
    assert "".join(shown[1:]) == row["text"]
    assert len(shown) > 15


def test_several_texts_are_printed_with_their_place(run, tmp_path, capsys):
    rows = run(prompt=["a", "b"], max_new_tokens=4, temperature=1.0, num_return_sequences=2)
    titles = [
        f"--- {tmp_path}/prompts.jsonl, line {n}, text {m} of 2" for n in (1, 2) for m in (1, 2)
    ]
    printed = capsys.readouterr().out
    assert printed == "".join(
        f"{title}\n{row['prompt']}{row['text']}\n" for title, row in zip(titles, rows, strict=True)
    )


def test_prompts_from_a_text_file_and_from_yaml(run, tmp_path, monkeypatch, folder):
    prompts = ["def ", "", " a\u2028b"]
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    rows = run(prompt_file=tmp_path / "prompts.txt", max_new_tokens=4)
    assert [row["prompt"] for row in rows] == prompts
    for name, line in {"marked.txt": "def ", "marked.jsonl": '{"prompt": "def "}'}.items():
        (tmp_path / name).write_text(line + "\n", encoding="utf-8-sig")  # as on Windows
        assert run(prompt_file=tmp_path / name, max_new_tokens=4) == rows[:1]
    config = tmp_path / "generate.yaml"
    config.write_text(f"model_name_or_path: {folder}\nprompt: {json.dumps(prompts)}\n")
    assert parse(generate.Arguments, [str(config)]).prompt == prompts


def test_prompts_that_are_no_unicode():
    arguments = generate.Arguments("model", prompt=["a", "b \udcff", "\ud83d"])
    with pytest.raises(InputError, match=r"^prompt 2 is not Unicode: 'b \\udcff'$"):
        generate.read_prompts(arguments)


@pytest.mark.parametrize("prompt", ["def ", "", "class A:", "- 1", "yes", "12", "# a", "[x]", "{"])
def test_a_prompt_on_the_command_line_is_taken_as_it_stands(prompt):
    argv = ["--model_name_or_path", "m", "--prompt", prompt]
    assert parse(generate.Arguments, argv).prompt == prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is nothing to continue: give prompt, prompt_file or chat"),
        (
            {"prompt": "a", "prompt_file": "b"},
            "prompt and prompt_file are both given: keep one of them",
        ),
        (
            {"prompt": "a", "max_new_tokens": 0},
            "max_new_tokens must be at least 1, not 0",
        ),
        ({"prompt": "a", "batch_size": -1}, "batch_size must be at least 1, not -1"),
        ({"prompt": "a", "num_beams": 0}, "num_beams must be at least 1, not 0"),
        (
            {"prompt": "a", "num_return_sequences": 0},
            "num_return_sequences must be at least 1, not 0",
        ),
        ({"prompt": "a", "top_k": 0, "temperature": 1}, "top_k must be at least 1, not 0"),
        (
            {"prompt": "a", "temperature": -1},
            "temperature must be 0 (no sampling) or more, not -1.0",
        ),
        (
            {"prompt": "a", "temperature": "nan"},
            "temperature must be 0 (no sampling) or more, not nan",
        ),
        (
            {"prompt": "a", "temperature": 1, "top_p": 1.5},
            "top_p must be above 0 and at most 1, not 1.5",
        ),
        (
            {"prompt": "a", "repetition_penalty": 0},
            "repetition_penalty must be above 0, not 0.0",
        ),
        ({"prompt": "a", "top_k": 5}, "top_k needs sampling: set temperature above 0"),
        ({"prompt": "a", "top_p": 0.9}, "top_p needs sampling: set temperature above 0"),
        (
            {"prompt": "a", "num_return_sequences": 2},
            "num_return_sequences (2) is more than num_beams (1): "
            "raise num_beams, or sample (temperature above 0, one beam)",
        ),
        (
            {"prompt": "a", "num_return_sequences": 4, "num_beams": 3, "temperature": 1},
            "num_return_sequences (4) is more than num_beams (3): "
            "raise num_beams, or sample (temperature above 0, one beam)",
        ),
        (
            {"prompt": "a", "dtype": "int4"},
            '--dtype: dtype must be "auto" or "float32" or "bfloat16" or "float16", not \'int4\'',
        ),
        (
            {"prompt": "a", "output_file": "missing/texts.jsonl"},
            "output_file missing/texts.jsonl: its folder is missing or read-only",
        ),
        ({"prompt": "a", "output_file": "."}, "output_file . is a folder: name a file"),
        ({"prompt_file": "none.txt"}, "cannot read none.txt: No such file or directory"),
        ({"prompt_file": "empty.txt"}, "empty.txt is empty: there is nothing to continue"),
        (
            {"prompt_file": "latin1.txt"},
            "latin1.txt is not UTF-8 text: unexpected end of data",
        ),
        (
            {"prompt_file": "broken.jsonl"},
            'broken.jsonl, line 2: expected {"prompt": "a text"}, not {"prompt": "b"',
        ),
        (
            {"prompt_file": "other.jsonl"},
            'other.jsonl, line 1: expected {"prompt": "a text"}, not {"text": "a"}',
        ),
        (
            {"prompt_file": "number.jsonl"},
            'number.jsonl, line 1: expected {"prompt": "a text"}, not {"prompt": 1}',
        ),
        (
            {"prompt_file": "half.jsonl"},
            'half.jsonl, line 1: expected {"prompt": "a text"}, not {"prompt": "\\ud83d"}',
        ),
        (
            {"prompt_file": "long.txt", "max_new_tokens": 100},
            "long.txt, line 2: 29 tokens and max_new_tokens (100) are more than the model's "
            "max_position_embeddings (128): shorten one of them",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_settings_and_prompts(run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("latin1.txt").write_bytes(b"caf\xe9")
    Path("broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"\n')
    Path("other.jsonl").write_text('{"text": "a"}\n')
    Path("number.jsonl").write_text('{"prompt": 1}\n')
    Path("half.jsonl").write_text('{"prompt": "\\ud83d"}\n')
    Path("long.txt").write_text(f"{'7' * 27}\n{'7' * 28}\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as error:
        run(**options)
    assert str(error.value) == message
    assert sorted(tmp_path.iterdir()) == before


def test_a_prompt_that_just_fits(run):
    run(prompt="7" * 27, max_new_tokens=100)
    assert len(run.sequences[0]) == 128


def test_bad_models(run, tmp_path, monkeypatch, loaded):
    tokenizer, model = loaded
    monkeypatch.chdir(tmp_path)

    def error(name: str) -> str:
        with pytest.raises(InputError) as error:
            run(model_name_or_path=name, prompt="def ", max_new_tokens=4)
        assert "\n" not in str(error.value)
        return str(error.value)

    absent = "runs/none/model (no such folder, so a name on the Hub) has no tokenizer that loads: "
    assert error("runs/none/model").startswith(absent)
    Path("empty").mkdir()
    assert error("empty").startswith("empty has no tokenizer that loads: ")
    model.save_pretrained("no_tokenizer")
    assert error("no_tokenizer").startswith("no_tokenizer has no tokenizer that loads: ")
    tokenizer.save_pretrained("no_model")
    assert error("no_model").startswith("no_model has no causal language model that loads: ")

    model.save_pretrained("cut")
    tokenizer.save_pretrained("cut")
    os.truncate("cut/model.safetensors", os.path.getsize("cut/model.safetensors") // 2)
    assert error("cut").startswith("cut has no causal language model that loads: ")

    LlamaForSequenceClassification(model.config).save_pretrained("classifier")
    tokenizer.save_pretrained("classifier")
    lacks = "it lacks the weights lm_head.weight"
    assert error("classifier") == f"classifier has no causal language model: {lacks}"

    make_model(Path("small"), vocab_size=40)
    tokenizer.save_pretrained("small")
    largest = max(tokenizer("def ", add_special_tokens=False).input_ids)
    assert error("small") == (
        f"prompt 1: token {largest} is beyond the model's 40 embeddings: "
        "this is not the model's tokenizer"
    )
    assert not Path("texts.jsonl").exists()


def test_a_failed_write_leaves_the_old_file(run, tmp_path, monkeypatch):
    run(prompt="def ", max_new_tokens=4)
    before = (tmp_path / "texts.jsonl").read_text()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    message = f"cannot write {tmp_path}/texts.jsonl: No space left on device"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        run(prompt="class ", max_new_tokens=4)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]
    assert (tmp_path / "texts.jsonl").read_text() == before


@pytest.mark.parametrize("beams", [1, 3])
def test_an_interrupt_in_a_batch_prints_what_was_made(run, tmp_path, monkeypatch, capsys, beams):
    options = {"prompt": PROMPTS, "batch_size": 2, "num_beams": beams}
    run(max_new_tokens=6, **options)
    first_batch = capsys.readouterr().out.split("---")[:3]
    (tmp_path / "texts.jsonl").unlink()

    tokens = 0
    stop = generate.Interrupt.__call__

    def press_at_the_ninth_token(*args, **kwargs):
        nonlocal tokens
        tokens += 1
        if tokens == 9:
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        return stop(*args, **kwargs)

    monkeypatch.setattr(generate.Interrupt, "__call__", press_at_the_ninth_token)
    with pytest.raises(SystemExit) as stopped:
        run(max_new_tokens=6, **options)
    assert stopped.value.code == 130
    assert tokens == 9
    printed = capsys.readouterr()
    *whole, third, fourth = printed.out.split("---")
    assert whole == first_batch
    assert third.partition("\n")[2].startswith(PROMPTS[2])
    assert fourth.partition("\n")[2].startswith(PROMPTS[3])
    assert len(run.inputs) == 2
    assert len(run.sequences[-1]) == len(run.inputs[-1][0][0]) + 3
    assert printed.err.endswith(
        f"interrupted: what was made so far stands above; {tmp_path}/texts.jsonl is not written\n"
    )
    assert not (tmp_path / "texts.jsonl").exists()


def test_the_program_streams_and_ends_on_ctrl_c(tmp_path, loaded):
    folder = make_model(tmp_path / "long", max_position_embeddings=1_000_000)
    tokenizer = make_tokenizer(folder, template=True)
    words = [sys.executable, PROGRAM, "--model_name_or_path", str(folder)]
    words += ["--prompt", "def ", "--max_new_tokens", "900000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, cwd=ROOT, env=one_thread, **pipes) as process:
        try:
            beginning = b""
            while len(beginning) < 40:  # while the rest is being made
                beginning += process.stdout.read(40)
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors.endswith(b"\ninterrupted: what was made so far stands above\n")
    assert b"Traceback" not in errors
    text = (beginning + rest).decode()
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = "def " + tokenizer.decode(greedy(tokenizer, model, "def ", 30))
    both = min(len(text), len(expected)) - 2  # the last character may be cut; a line break
    assert both > 10
    assert text[:both] == expected[:both]


def test_the_program_names_bad_input_in_one_line_and_ends_with_2():
    done = programs.start(PROGRAM, "--model_name_or_path", "m", "--promt", "a")
    assert done.returncode == 2
    assert done.stdout == ""
    message = "error: --promt: unknown key 'promt': the nearest valid one is 'prompt'"
    assert done.stderr.splitlines()[-1] == message
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_the_model_loads_ends_with_130():
    program = (
        "import signal\nfrom utils.config import command\n"
        # a shell that starts something in the background has it ignore Ctrl-C
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "command(lambda: (print('loading'), signal.raise_signal(signal.SIGINT)))"
    )
    done = programs.start("-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (130, "loading\n", "")


def test_every_documented_command_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/demo").mkdir(parents=True)
    page = (ROOT / "recipes/causal_lm/README.md").read_text()
    commands = documented_commands(PROGRAM, generate.__doc__, page)
    assert len(commands) >= 10
    given = [parse(generate.Arguments, words) for words in commands]
    assert {(args.model_name_or_path, args.chat) for args in given} == {
        ("runs/demo/model", False),
        ("runs/causal_lm/finetune_demo/model", True),
    }


ASSISTANTS = {
    "the model itself": {},
    "one that drafts badly": {"hidden_size": 16, "num_hidden_layers": 1},
    "one with more padding": {"vocab_size": VOCABULARY + 20},
    "one with less padding": {"vocab_size": VOCABULARY - 1},
}


@pytest.mark.parametrize("kind", ASSISTANTS)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_an_assistant_changes_no_greedy_text(run, tmp_path, caplog, kind, penalty):
    assistant = make_model(tmp_path / "assistant", **ASSISTANTS[kind])
    make_tokenizer(assistant, template=True)
    options = {"prompt": PROMPTS, "max_new_tokens": 24, "repetition_penalty": penalty}
    alone, calls = run(**options), len(run.inputs)
    assert len({row["text"] for row in alone}) == len(PROMPTS)
    assert run(**options, assistant_model_name_or_path=assistant) == alone
    assert len(run.inputs) > calls  # it drafts by `generate`, too
    assert not caplog.messages


def test_samples_with_an_assistant_have_the_distribution_of_the_model(run, tmp_path):
    assistant = make_model(tmp_path / "assistant", hidden_size=16)
    make_tokenizer(assistant, template=True)
    options = {"prompt": ["def "] * 200, "max_new_tokens": 2, "temperature": 2.0, "top_k": 3}
    counts = [
        Counter(row["text"] for row in run(**options, **more))
        for more in ({}, {"assistant_model_name_or_path": assistant})
    ]
    assert len(counts[0]) > 4
    for text in counts[0] | counts[1]:
        assert abs(counts[0][text] - counts[1][text]) < 30  # of 200: three deviations


def test_an_assistant_that_cannot_help_is_refused(run, tmp_path):
    other = make_model(tmp_path / "other")
    tokenizer = make_tokenizer(other, template=True)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)
    short = make_model(tmp_path / "short", max_position_embeddings=16)
    make_tokenizer(short, template=True)
    recurrent = tmp_path / "recurrent"
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(recurrent)
    make_tokenizer(recurrent, template=True)
    for assistant, more, message in (
        (other, {}, "has another tokenizer"),
        (short, {}, "are more than the model's max_position_embeddings"),
        (recurrent, {}, "is recurrent and cannot take back a draft"),
        (tmp_path / "none", {}, "has no tokenizer that loads"),
        (short, {"num_beams": 2}, "leave num_beams and num_return_sequences at 1"),
    ):
        with pytest.raises(InputError, match=message):
            run(prompt="def ", assistant_model_name_or_path=assistant, **more)
