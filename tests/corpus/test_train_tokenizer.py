"""recipes/corpus/train_tokenizer.py, on Python's own help texts and on texts made up here."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import regex
import zstandard
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertConfig, LlamaConfig

from packing import DocumentEncoder
from programs import ROOT, documented_commands
from recipes.corpus import train_tokenizer
from recipes.corpus.train_tokenizer import Arguments, Text
from utils.config import InputError, parse
from utils.sources import Source, SourceArguments

PROGRAM = "recipes/corpus/train_tokenizer.py"
HELP_TEXTS = [topics[key] for key in sorted(topics)][:40]
# no vocabulary of help texts has seen these
STRINGS = [
    "",
    " ",
    "   leading, trailing   ",
    "tabs\t\tand\r\nline\rbreaks\n\n\n",
    "\x00\x01\x7f\x85\u2028\u2029\ufeff",
    "don't WON'T we'Ll 1234567890 3.14159e-10",
    "naïve e\u0301 ﬁ ½ İ ß ς",
    "日本語と한국어、العربية हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🇩🇪 \U0010ffff \ufffd",
    "<|end_of_text|>",
    "a<|begin_of_text|> <|pad|><|end_of_text|>b [CLS] </s>",
    "▁ Ġ Ċ Â ##x",
    "if x:\n    return {'a': [1, 2]}  # ok\n",
]


def write_jsonl(path: Path, texts: list[str], domain: str = "Help") -> Path:
    records = [{"text": text, "meta": {"redpajama_set_name": domain}} for text in texts]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(output_dir: Path, source: Path | list[dict], **options) -> Path:
    """The recipe, called in this process."""
    sources = source if isinstance(source, list) else [{"path": str(source)}]
    options = {"output_dir": str(output_dir), "train_sources": sources, **options}
    words = []
    for key, value in options.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_tokenizer.py", *words])
        train_tokenizer.main()
    return output_dir


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "train.jsonl", HELP_TEXTS)


@pytest.fixture(scope="module")
def bpe(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "new" / "bpe"
    return run(folder, corpus, algorithm="bpe", vocab_size=512)


@pytest.fixture(scope="module")
def wordpiece(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "wordpiece"
    options = {"vocab_size": 512, "lowercase": True, "model_max_length": 16}
    return run(folder, corpus, algorithm="wordpiece", **options)


def naive_merges(
    words: Counter[tuple[int, ...]], tokens: list[str], size: int, prefix: str = ""
) -> list[str]:
    """The textbook: merge the most frequent pair, the one of the smallest ids among equals."""
    tokens = list(tokens)
    while len(tokens) < size:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        best, count = min(pairs.items(), key=lambda item: (-item[1], item[0]))
        if count < 2:
            break
        tokens.append(tokens[best[0]] + tokens[best[1]].removeprefix(prefix))
        merged = Counter()
        for word, count in words.items():
            new, i = [], 0
            while i < len(word):
                if word[i : i + 2] == best:
                    new.append(len(tokens) - 1)
                    i += 2
                else:
                    new.append(word[i])
                    i += 1
            merged[tuple(new)] += count
        words = merged
    return tokens


def test_bpe_learns_the_merges_of_the_textbook(tmp_path):
    texts = [*HELP_TEXTS[:3], "don't 1234567 naïve naïve\r\n\r\n  x\n"]
    folder = run(
        tmp_path / "bpe", write_jsonl(tmp_path / "a.jsonl", texts), algorithm="bpe", vocab_size=400
    )
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [backend.id_to_token(i) for i in range(259)]
    # GPT-2's way to print a byte: those that have a sign of their own, then the others
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in shown}
    byte_of |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in shown)}
    assert tokens[:3] == ["<|pad|>", "<|begin_of_text|>", "<|end_of_text|>"]
    assert tokens[3:] == sorted(byte_of)
    id_of = {byte_of[token]: i for i, token in enumerate(tokens[3:], 3)}
    words = Counter(
        tuple(id_of[byte] for byte in word.encode())
        for text in texts
        for word in regex.findall(train_tokenizer.SPLIT_PATTERN, text)
    )
    expected = naive_merges(words, tokens, 400)
    assert [backend.id_to_token(i) for i in range(400)] == expected
    assert backend.get_vocab_size() == 400


def test_wordpiece_learns_the_merges_of_the_textbook(tmp_path):
    texts = [
        "Low lower lowest, new newer newest! Été étés wide; wider (widest)",
        "low new été 東京 東京",
    ]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    folder = run(tmp_path / "wp", source, algorithm="wordpiece", vocab_size=60, lowercase=True)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain = " ".join(texts).lower().replace("é", "e")
    words = regex.findall(r"\p{Han}|[a-z]+|[^\s\w]", plain)
    alphabet = sorted(c for c, n in Counter("".join(words)).items() if n > 1)
    assert alphabet == [*"deilnorstw", "京", "東"]  # each of the signs is there but once
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *("##" + c for c in alphabet if c.isascii()), *alphabet]
    id_of = {token: i for i, token in enumerate(tokens)}
    spelled = Counter(
        tuple(id_of[c if i == 0 else "##" + c] for i, c in enumerate(word))
        for word in words
        if word in alphabet or len(word) > 1
    )
    expected = naive_merges(spelled, tokens, 60, prefix="##")
    assert [backend.id_to_token(i) for i in range(backend.get_vocab_size())] == expected
    assert {"low", "##est", "ete"} <= set(expected)


def test_bpe_splits_before_it_merges(bpe):
    split = Tokenizer.from_file(str(bpe / "tokenizer.json")).pre_tokenizer.pre_tokenize_str
    text = "I'll pay 12345 dollars!!\n\n  (now) \tx"
    words = [text[slice(*span)] for _, span in split(text)]
    expected = ["I", "'ll", " pay", " ", "123", "45", " dollars", "!!\n\n", " ", " (", "now", ")"]
    assert words == [*expected, " ", "\tx"]


def test_bpe_gives_every_string_back(bpe):
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    scalars = [i for i in range(0, 0x110000, 31) if not 0xD800 <= i < 0xE000]
    everything = "".join(map(chr, scalars))
    draw = random.Random(0)
    scattered = ["".join(map(chr, draw.choices(scalars, k=50))) for _ in range(200)]
    bytelike = ["".join(draw.choices(" \t\r\n'a1é<|>", k=30)) for _ in range(500)]
    for text in [*STRINGS, everything, *scattered, *bytelike, *HELP_TEXTS[:5]]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        plain = re.sub(r"<\|(pad|begin_of_text|end_of_text)\|>", "", text)
        assert tokenizer.decode([1, *ids], skip_special_tokens=True) == plain


def test_special_tokens_of_bpe(bpe):
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    assert len(tokenizer) == tokenizer.vocab_size == 512
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (0, 1, 2)
    assert LlamaConfig().bos_token_id == 1
    assert LlamaConfig().eos_token_id == 2
    plain = tokenizer("return x", add_special_tokens=False)["input_ids"]
    more = tokenizer(" y", add_special_tokens=False)["input_ids"]
    assert tokenizer("return x")["input_ids"] == [1, *plain]
    assert tokenizer("return x", " y")["input_ids"] == [1, *plain, 1, *more]
    batch = tokenizer(["return x", ""], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    settings = json.loads((bpe / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert batch["input_ids"][1] == [0] * len(plain) + [1]
    # in a corpus the name of a special token is text
    text = "<|end_of_text|><|pad|>"
    encoded = DocumentEncoder(tokenizer)([text])[0].tolist()
    assert [encoded[0], encoded[-1]] == [1, 2]
    assert min(encoded[1:-1]) > 2
    assert tokenizer.decode(encoded[1:-1]) == text
    assert tokenizer.model_max_length > 10**9
    assert tokenizer.clean_up_tokenization_spaces is False


def test_wordpiece_reads_like_bert(wordpiece, corpus, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(wordpiece)
    assert len(tokenizer) == tokenizer.vocab_size == 512
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
    special = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.cls_token)
    assert (*special, tokenizer.sep_token, tokenizer.mask_token) == tuple(names)
    assert BertConfig().pad_token_id == 0
    assert tokenizer.tokenize("If the") == tokenizer.tokenize("ÎF  thé") == ["if", "the"]
    assert tokenizer.tokenize("the [MASK] 漢") == ["the", "[MASK]", "[UNK]"]
    the, if_ = tokenizer.convert_tokens_to_ids(["the", "if"])
    pair = tokenizer(["the", "the"], ["if if", "if"], padding=True)
    assert pair["input_ids"] == [[2, the, 3, if_, if_, 3], [2, the, 3, if_, 3, 0]]
    assert pair["token_type_ids"] == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert pair["attention_mask"] == [[1] * 6, [1] * 5 + [0]]
    assert len(tokenizer("the " * 99, truncation=True)["input_ids"]) == 16

    cased = run(tmp_path / "cased", corpus, algorithm="wordpiece", vocab_size=512)
    tokenizer = AutoTokenizer.from_pretrained(cased)
    assert tokenizer.tokenize("The the") == ["The", "the"]


@pytest.mark.parametrize("config", [None, LlamaConfig, BertConfig])
@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
def test_auto_tokenizer_reads_the_same_beside_a_model(algorithm, config, request, tmp_path):
    folder = request.getfixturevalue(algorithm)
    names = {path.name for path in folder.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json"}
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for name in names:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    if config is not None:
        config().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*STRINGS, *HELP_TEXTS[:5]]:
        assert tokenizer(text)["input_ids"] == raw.encode(text).ids
        pair = raw.encode(text, "and on")
        assert tokenizer([text], ["and on"])["input_ids"] == [pair.ids]
    has_types = "token_type_ids" in tokenizer("text")
    assert has_types == (algorithm == "wordpiece")
    tokenizer.save_pretrained(tmp_path / "again")
    again = (tmp_path / "again" / "tokenizer.json").read_bytes()
    assert again == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
def test_the_same_text_gives_the_same_file(algorithm, corpus, tmp_path, monkeypatch):
    """Whatever the threads, the order of the documents and the format of the files."""
    lines = corpus.read_bytes().splitlines(keepends=True)
    half = len(lines) // 2
    (tmp_path / "reversed.jsonl").write_bytes(b"".join(lines[::-1]))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:half])))
    (tmp_path / "files" / "b.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[half:-5])))
    table = pyarrow.Table.from_pylist([json.loads(line) for line in lines[-5:]])
    pyarrow.parquet.write_table(table, tmp_path / "files" / "c.parquet")
    seen = set()
    sources = [corpus, corpus, tmp_path / "reversed.jsonl", tmp_path / "files"]
    for index, source in enumerate(sources):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false" if index == 1 else "true")
        folder = run(tmp_path / str(index), source, algorithm=algorithm, vocab_size=1024)
        seen.add((folder / "tokenizer.json").read_bytes())
    assert len(seen) == 1


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
def test_bytes_per_token(algorithm, corpus, tmp_path, capsys):
    code = ["def f(x):\n    return x\n", "naïve <|end_of_text|> 漢字"]
    prose = ["A line.", "An other line, longer."]
    write_jsonl(tmp_path / "code.jsonl", code, "Code")
    write_jsonl(tmp_path / "prose.jsonl", prose, "Prose")
    held_out = {"domain_field": "meta.redpajama_set_name", "path": str(tmp_path / "*.jsonl")}
    options = {"algorithm": algorithm, "vocab_size": 512, "validation_sources": [held_out]}
    folder = run(tmp_path / "tokenizer", corpus, **options)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.encode_special_tokens = True

    def expected(name: str, texts: list[str]) -> list[str]:
        tokens = [raw.encode(text, add_special_tokens=False).tokens for text in texts]
        size, count = sum(len(text.encode()) for text in texts), sum(map(len, tokens))
        row = [name, str(size), str(count), f"{size / count:.3f}"]
        unknown = sum(token == "[UNK]" for document in tokens for token in document)
        return row if algorithm == "bpe" else [*row, f"{unknown / count:.2%}", "unknown"]

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:4] == [
        expected("Code", code),
        expected("Prose", prose),
        expected("total", code + prose),
    ]
    assert lines[1][1] == "52"  # bytes, not characters
    assert lines[-1] == [f"{tmp_path}/tokenizer:", f"{algorithm},", "512", "tokens"]


def test_max_train_bytes_are_shared_by_weight_and_among_files(tmp_path):
    for name, count in {"a/1": 50, "b/1": 3, "b/2": 50}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i:06d}" for i in range(count)])
    weights = {"a": 2.0, "b": 1.0}
    sources = [Source(str(tmp_path / name), weight=weight) for name, weight in weights.items()]
    whole = Text(sources, SourceArguments())

    def read(max_bytes: int | None) -> dict[str, int]:
        texts = [document.text for document in whole.read("reading", max_bytes)]
        assert len(set(texts)) == len(texts)
        return Counter(text[:3] for text in texts)

    # documents of 10 bytes; what b/1 lacks, b/2 gives
    assert read(600) == {"a/1": 40, "b/1": 3, "b/2": 17}
    assert read(None) == {"a/1": 50, "b/1": 3, "b/2": 50}
    (tmp_path / "b" / "1.jsonl").unlink()
    assert read(5) == {"a/1": 1}  # the document that goes over a share is the last


@pytest.mark.parametrize(("algorithm", "start"), [("bpe", "Ġ"), ("wordpiece", "")])
def test_max_train_bytes_and_a_weight_of_0_bound_what_is_learned(algorithm, start, tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", ["alpha alpha alpha"] * 10 + ["omega omega omega"])
    other = write_jsonl(tmp_path / "b.jsonl", ["gamma gamma gamma"])

    def learned(**options) -> set[str]:
        sources = [{"path": str(first)}, {"path": str(other), "weight": 0}]
        folder = run(tmp_path / "out", sources, algorithm=algorithm, vocab_size=300, **options)
        vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
        return {word for word in ("alpha", "omega", "gamma") if start + word in vocabulary}

    assert learned() == {"alpha", "omega"}
    assert learned(max_train_bytes=170) == {"alpha"}


def test_limit_alphabet_keeps_the_most_frequent_characters(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["aaaa bb bb dd cc é é", "zzzz zzzz"])
    options = {"algorithm": "wordpiece", "vocab_size": 64, "min_frequency": 1}
    folder = run(tmp_path / "out", path, **options, limit_alphabet=3, max_train_bytes=10)
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    # c, d and é are as frequent; z is not read
    assert {token for token in vocabulary if len(token) == 1} == {"a", "b", "c"}


@pytest.mark.parametrize("max_bytes", [None, 200_000])
def test_progress_tells_the_time_left(max_bytes, tmp_path, capsys, monkeypatch):
    seconds = iter(range(100))
    clock = SimpleNamespace(monotonic=lambda: next(seconds))  # a second passes at every look
    monkeypatch.setattr(train_tokenizer, "time", clock)
    monkeypatch.setattr(train_tokenizer, "PROGRESS_SECONDS", 0)
    source = Source(str(write_jsonl(tmp_path / "a.jsonl", ["x" * 100_000] * 4)))
    list(Text([source], SourceArguments()).read("reading", max_bytes))
    lines = capsys.readouterr().err.splitlines()
    if max_bytes is None:
        assert lines == [
            "reading: 0.1 MB of text, 25%, 0:00:09 left",
            "reading: 0.2 MB of text, 50%, 0:00:06 left",
            "reading: 0.3 MB of text, 75%, 0:00:03 left",
            "reading: 0.4 MB of text, 100%, 0:00:00 left",
            "reading: 0.4 MB of text in 13 s",
        ]
    else:
        assert lines == [
            "reading: 0.1 MB of text, 50%, 0:00:03 left",
            "reading: 0.2 MB of text, 100%, 0:00:00 left",
            "reading: 0.2 MB of text in 7 s",
        ]


BAD_SETTINGS = {
    "vocab_size 200 is too small: 256 bytes and 3 special tokens need 259": {"vocab_size": 200},
    "lowercase is for wordpiece: bpe keeps every string as it is": {"lowercase": True},
    "min_frequency must be 1 or more, not 0": {"min_frequency": 0},
    "max_train_bytes must be 1 or more, not -1": {"max_train_bytes": -1},
    "train_sources is empty: give at least one path": {"train_sources": []},
    "the weights of train_sources must be positive, not [0.0]": {
        "train_sources": [{"path": "a.jsonl", "weight": 0}]
    },
    "the weights of train_sources must be positive, not [2.0, -1.0]": {
        "train_sources": [{"path": "a.jsonl", "weight": w} for w in (2, -1)]
    },
    "--vocab_siz: unknown key 'vocab_siz': the nearest valid one is 'vocab_size'": {"vocab_siz": 1},
    '--algorithm: algorithm must be "bpe" or "wordpiece", not \'bp\'': {"algorithm": "bp"},
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_bad_settings(message, corpus, tmp_path):
    with pytest.raises(InputError) as error:
        run(tmp_path / "out", corpus, **{"algorithm": "bpe"} | BAD_SETTINGS[message])
    assert str(error.value) == message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
@pytest.mark.parametrize("option", ["train_sources", "validation_sources"])
def test_bad_text(option, algorithm, corpus, tmp_path):
    """Named before anything is written, whichever sources it stands in."""
    path = tmp_path / "a.jsonl"
    contents = {
        "": f"source '{path}' is empty: no document in {path}",
        '{"text": " "}\n': f"source '{path}' is empty: no document in {path}",
        '\n{"content": "x", "id": 1}\n': (
            f"source '{path}': {path}, line 2: no field 'text' (it has: content, id)"
        ),
        '{"text": null}\n': (
            f"source '{path}': {path}, line 1: null in the field 'text' (it has: text)"
        ),
        "nothing\n": (
            f"source '{path}': {path}, line 1: not JSON: Expecting value: line 1 column 1 (char 0)"
        ),
    }
    for content, message in contents.items():
        path.write_text(content)
        with pytest.raises(InputError) as error:
            run(tmp_path / "out", corpus, algorithm=algorithm, **{option: [{"path": str(path)}]})
        assert str(error.value) == message
    path.unlink()
    with pytest.raises(InputError, match=f"source '{re.escape(str(path))}': no file matches"):
        run(tmp_path / "out", corpus, algorithm=algorithm, **{option: [{"path": str(path)}]})
    assert not list(tmp_path.iterdir())


def test_a_broken_record_far_in_stops_the_training_or_is_skipped(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ["some words, some more words"] * 1000)
    path.write_text(path.read_text() + "half a rec\n")
    broken = f"{path}, line 1001: not JSON: Expecting value: line 1 column 1 (char 0)"
    for algorithm in ("bpe", "wordpiece"):
        options = {"algorithm": algorithm, "vocab_size": 260, "validation_sources": [str(path)]}
        options["validation_sources"] = [{"path": str(path)}]
        with pytest.raises(InputError, match=re.escape(broken)):
            run(tmp_path / "out", path, **options)
        assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
        capsys.readouterr()
        run(tmp_path / algorithm, path, **options, on_bad_record="skip")
        AutoTokenizer.from_pretrained(tmp_path / algorithm)
        out, err = capsys.readouterr()
        assert err.count(f"warning: skipped {broken}\n") == 2  # once in each corpus
        assert out.count("skipped 1 broken records\n") == 2
        (tmp_path / algorithm).rename(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")


def test_wordpiece_needs_room_for_its_characters(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["abc, abc"])
    with pytest.raises(InputError) as error:
        run(tmp_path / "out", path, algorithm="wordpiece", vocab_size=10)
    assert str(error.value) == (
        "vocab_size 10 is too small: 3 characters, 3 of them also inside words, and 5 special "
        "tokens need 11; a lower limit_alphabet (now 1000) needs fewer"
    )


def test_fewer_tokens_than_asked_for_are_reported(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ["ab ab cd"])
    folder = run(tmp_path / "bpe", path, algorithm="bpe", vocab_size=1024)
    assert len(AutoTokenizer.from_pretrained(folder)) == 260  # bytes, special tokens and "ab"
    out, err = capsys.readouterr()
    assert (
        "warning: 260 tokens came out, not 1024: no other pair is seen 2 times; "
        "give more text, or a lower vocab_size\n"
    ) in err
    assert out == f"{folder}: bpe, 260 tokens\n"


def test_output_dir(corpus, tmp_path, monkeypatch):
    def refused(output_dir: Path) -> str:
        with pytest.raises(InputError) as error:
            run(output_dir, corpus, algorithm="bpe", vocab_size=259)
        return str(error.value)

    file = tmp_path / "file"
    file.write_text("mine")
    assert refused(file) == f"output_dir {file}: {file} is a file, not a folder"
    assert refused(file / "x") == f"output_dir {file / 'x'}: {file} is a file, not a folder"
    assert file.read_text() == "mine"

    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_text("mine")
    assert refused(other) == (
        f"output_dir {other} holds more than a tokenizer (model.safetensors): name another folder"
    )
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    closed = tmp_path / "closed" / "x"
    assert refused(closed) == f"output_dir {closed}: no permission to write in {tmp_path}"
    monkeypatch.undo()

    folder = run(tmp_path / "tokenizer", corpus, algorithm="wordpiece", vocab_size=512)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(train_tokenizer.PreTrainedTokenizerFast, "save_pretrained", _fail)
    with pytest.raises(OSError, match="no space left"):
        run(folder, corpus, algorithm="bpe", vocab_size=259)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    run(folder, corpus, algorithm="bpe", vocab_size=259)
    assert len(AutoTokenizer.from_pretrained(folder)) == 259
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other", "tokenizer"]


def _fail(tokenizer, folder: Path) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{")
    raise OSError("no space left")


def test_an_error_is_one_line_and_status_2(tmp_path):
    words = ["--algorithm", "bpe", "--output_dir", tmp_path / "out"]
    words += ["--train_sources", f"[{{path: {tmp_path}/none.jsonl}}]"]
    done = subprocess.run([sys.executable, PROGRAM, *words], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert re.fullmatch(
        rf"error: source '{tmp_path}/none.jsonl': no file .*\n", done.stderr.decode()
    )
    assert not list(tmp_path.iterdir())


def test_interrupt_while_merging_stops_at_once(tmp_path):
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=12)) for _ in range(200_000)]
    path = write_jsonl(tmp_path / "a.jsonl", [" ".join(words)])
    options = ["--algorithm", "bpe", "--vocab_size", "100000", "--min_frequency", "1"]
    options += ["--output_dir", tmp_path / "out", "--train_sources", f"[{{path: {path}}}]"]
    with subprocess.Popen(
        [sys.executable, PROGRAM, *options], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            if line.startswith("merging pairs"):
                break
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=5) == -signal.SIGINT
        finally:
            process.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_commands_and_configs_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    configs = {
        f"recipes/corpus/configs/train_tokenizer_{name}_sample.yaml"
        for name in ("bpe", "wordpiece")
    }
    documented = documented_commands(PROGRAM, train_tokenizer.__doc__)
    assert {words[0] for words in documented} == configs
    documented += documented_commands(PROGRAM, Path("recipes/corpus/README.md").read_text())
    assert {words[0] for words in documented[2:]} == configs
    for words in documented:
        args = parse(Arguments, words)
        assert args.vocab_size == 8192
        assert args.output_dir == f"data/tokenizers/{args.algorithm}-8192"
        assert [source.path for source in args.train_sources] == ["data/sample/train-*.jsonl"]
        assert [source.path for source in args.validation_sources] == [
            "data/sample/validation.jsonl"
        ]


def test_regular_expressions_are_given_parts_of_a_text(tmp_path, monkeypatch, capsys):
    """They give up on ten million blanks."""
    monkeypatch.setattr(train_tokenizer, "PART", 1000)
    text = "a" + " " * 2500 + "b"
    assert [len(part) for part in train_tokenizer.in_parts(text)] == [1000, 1000, 502]
    assert "".join(train_tokenizer.in_parts(text)) == text
    source = [{"path": str(write_jsonl(tmp_path / "blanks.jsonl", [text, *HELP_TEXTS]))}]
    run(tmp_path / "out", source, algorithm="bpe", vocab_size=512, validation_sources=source)
    size = len(text) + sum(len(text.encode()) for text in HELP_TEXTS)
    assert f"{size:,}" in capsys.readouterr().out


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece"])
def test_a_long_word_is_learned_from_in_pieces_and_encoded_whole(algorithm, tmp_path):
    """Unbroken text would take minutes a megabyte."""
    limit = train_tokenizer.LONGEST_WORD
    draw = random.Random(0)
    word = "".join(draw.choices("ACGT", k=limit * 5 // 2))
    pieces = [word[start : start + limit] for start in range(0, len(word), limit)]
    if algorithm == "wordpiece":
        word, pieces = word.lower(), [piece.lower() for piece in pieces]
    options = {"algorithm": algorithm, "vocab_size": 400 if algorithm == "bpe" else 60}
    whole = run(tmp_path / "whole", write_jsonl(tmp_path / "whole.jsonl", [word] * 3), **options)
    cut = run(tmp_path / "cut", write_jsonl(tmp_path / "cut.jsonl", pieces * 3), **options)
    assert (whole / "tokenizer.json").read_bytes() == (cut / "tokenizer.json").read_bytes()
    # words that are shorter are learned from as they are; what is saved cuts nothing
    backend = json.loads((whole / "tokenizer.json").read_text())
    assert str(limit) not in json.dumps(backend["pre_tokenizer"])
    if algorithm == "bpe":
        tokenizer = AutoTokenizer.from_pretrained(whole)
        assert tokenizer.decode(tokenizer(word, add_special_tokens=False)["input_ids"]) == word
