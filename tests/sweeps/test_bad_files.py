"""Every kind of bad file x every recipe that reads such data x every part of the data.

One line that names the file and, where there is one, the line or row; status 2, and nothing is
written. What streams can also leave a bad record or file out, and say so. `make sweep` tries all of
them, `make test` every tenth by the hash of its name.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conftest import make_documents, make_prose
from conversations import CHAT_TEMPLATES, ConversationArguments, set_chat_template
from launching import TINY_BERT, TINY_RUN, command_line, metrics
from recipes.bert import pretrain as bert
from recipes.causal_lm import finetune as instructions
from recipes.causal_lm import pretrain as causal_lm
from recipes.classification import finetune as classification
from recipes.corpus import train_tokenizer
from recipes.question_answering import finetune as question_answering
from recipes.summarization import finetune as summarization

PARTS = ("train", "validation", "test")
EVER_FAILED = ("surrogate", "null", "utf-16", "deep", "twice")
GARBAGE = bytes(range(256)) * 8


def is_swept(name: str) -> bool:
    """Whether `make test` tries it, too."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    return "SWEEP" in os.environ or number % 10 == 0


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def with_row(change: Callable[[dict, str], Any]) -> Callable[[list[dict], str], bytes]:
    """The second row is changed."""
    return lambda rows, text: lines([rows[0], change(rows[1], text), *rows[2:]])


# name: the file's ending, (good rows, the name of their text) → bytes, what is said of the file
RECORDS = {
    "null": (".jsonl", with_row(lambda row, text: {**row, text: None}), "line 2: .*null"),
    "number": (".jsonl", with_row(lambda row, text: {**row, text: 5}), "line 2: .*text, not|int"),
    "missing": (
        ".jsonl",
        with_row(lambda row, text: {"x": 1}),
        "line 2: n.* (column|field|of the)",
    ),
    "no mapping": (".jsonl", with_row(lambda row, text: [1]), "line 2: no.*"),
    "surrogate": (
        ".jsonl",
        with_row(lambda row, text: {**row, text: "half \ud83d of it"}),
        "line 2: .*(not|no) Unicode",
    ),
    "cut line": (".jsonl", lambda rows, text: lines(rows)[:-9], r"line \d+: not JSON"),
    "deep": (
        ".jsonl",
        lambda rows, text: lines(rows[:1]) + b"[" * 100_000 + b"\n",
        "line 2: not JSON: maximum recursion",
    ),
    "parquet as jsonl": (".jsonl", lambda rows, text: parquet(rows), "line 1: not (JSON|UTF-8)"),
    "utf-16": (
        ".jsonl",
        lambda rows, text: lines(rows).decode().encode("utf-16"),
        "line 1: not (JSON|UTF-8)",
    ),
    "garbage.jsonl": (".jsonl", lambda rows, text: GARBAGE, r"line \d+: not (JSON|UTF-8)"),
    "garbage.parquet": (".parquet", lambda rows, text: GARBAGE, ".*(magic|footer)"),
    "jsonl as parquet": (".parquet", lambda rows, text: lines(rows), ".*(magic|footer)"),
    "truncated parquet": (".parquet", lambda rows, text: parquet(rows)[:-9], ".*(magic|footer)"),
    "parquet null": (
        ".parquet",
        lambda rows, text: parquet([rows[0], {**rows[1], text: None}]),
        "row [12]: .*null",
    ),
}
TABLES = RECORDS | {
    "empty": (".jsonl", lambda rows, text: b"", "holds no rows"),
    "header twice": (
        ".csv",
        lambda rows, text: f"{text},label,{text}\n".encode(),
        "two columns are called",
    ),
    "garbage.csv": (".csv", lambda rows, text: GARBAGE, r"line \d+: not UTF-8"),
    "utf-16.csv": (
        ".csv",
        lambda rows, text: f"{text},label\na,b\n".encode("utf-16"),
        "line 1: not UTF-8",
    ),
    "latin-1.csv": (
        ".csv",
        lambda rows, text: f"{text},label\na,b\né,b\n".encode("latin-1"),
        "line 3: not UTF-8",
    ),
    "quote.csv": (
        ".csv",
        lambda rows, text: f'{text},label\na,b\n"a,b\n'.encode(),
        "line 3: here begins no record",
    ),
    "ragged.csv": (
        ".csv",
        lambda rows, text: f"{text},label\na\n".encode(),
        "line 2: fewer values",
    ),
    "jsonl as csv": (".csv", lambda rows, text: lines(rows), "line 2: |none of|no column"),
    "json": (".json", lambda rows, text: b'{"rows": []}', "expected a list of rows"),
    "archive": (".jsonl.gz", lambda rows, text: gzip.compress(lines(rows)), "give files of one of"),
}
SOURCES = RECORDS | {
    "empty": (".jsonl", lambda rows, text: b"", "no document in"),
    "blank": (".jsonl", lambda rows, text: lines([{text: " \n"}]), "no document in"),
    "garbage.gz": (".jsonl.gz", lambda rows, text: GARBAGE, "Not a gzipped file"),
    "garbage.zst": (".jsonl.zst", lambda rows, text: GARBAGE, ".*(frame|descriptor)"),
    "truncated.gz": (
        ".jsonl.gz",
        lambda rows, text: gzip.compress(lines(rows))[:15],
        "Compressed file ended",
    ),
    "truncated.zst": (
        ".jsonl.zst",
        lambda rows, text: zstandard.compress(lines(rows))[:15],
        "the compressed stream ends",
    ),
}


def question(number: int, row: dict) -> dict:
    answer = row["text"].split()[0]
    answers = {"text": [answer], "answer_start": [row["text"].index(answer)]}
    return {"id": str(number), "question": "What?", "context": row["text"], "answers": answers}


PROSE = make_prose("row", 24)
# recipe: its main, the name of its text, its rows, its settings
FINETUNING = {
    "classification": (
        classification.main,
        "text",
        [{"text": row["text"], "label": "ab"[n % 2]} for n, row in enumerate(PROSE)],
        {"model": TINY_BERT["model"]},
    ),
    "question_answering": (
        question_answering.main,
        "context",
        [question(n, row) for n, row in enumerate(PROSE)],
        {"model": TINY_BERT["model"], "doc_stride": 8},
    ),
    "summarization": (
        summarization.main,
        "document",
        [{"document": row["text"], "summary": row["text"][:20]} for row in PROSE],
        {
            "model": TINY_RUN["model"],
            "source_suffix": "\nTL;DR:\n",
            "max_source_length": 40,
            "max_target_length": 16,
        },
    ),
    "conversations": (
        instructions.main,
        "prompt",
        [{"prompt": row["text"][:12], "completion": row["text"][:8]} for row in PROSE],
        {"model": TINY_RUN["model"], "chat_template": "plain"},
    ),
}
PRETRAINING = {
    "causal_lm": (causal_lm.main, TINY_RUN),
    "bert": (bert.main, TINY_RUN | TINY_BERT),
    "train_tokenizer": (train_tokenizer.main, {"algorithm": "bpe", "vocab_size": 300}),
}


def write(folder: Path, name: str, kinds: dict, rows: list[dict], text: str) -> tuple[Path, str]:
    """(the file, what is said of it)"""
    suffix, content, message = kinds[name]
    path = folder / f"bad-{name.replace(' ', '-').replace('.', '-')}{suffix}"
    path.write_bytes(content(rows, text))
    return path, message


def assert_refused(ended: Any, path: Path, message: str) -> None:
    assert ended.status == 2, ended.error
    errors = [line for line in ended.error.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1, ended.error
    assert errors[0].startswith("error: ")
    assert str(path) in errors[0]
    assert re.search(message, errors[0]), errors[0]
    assert not ended.folder.exists()


def finetuning_words(
    recipe: str, folder: Path, data: dict[str, Any], wordpiece: Path, bpe: Path, **more: Any
) -> list[str]:
    _, _, _, settings = FINETUNING[recipe]
    is_bert = settings["model"] == TINY_BERT["model"]
    given = {"output_dir": folder, "tokenizer": wordpiece if is_bert else bpe}
    lengths = {} if recipe == "summarization" else {"sequence_length": 64}
    return command_line({**given, **lengths, **data, **settings, **more})


CASES = [(recipe, name, part) for recipe in FINETUNING for name in TABLES for part in PARTS]


@pytest.mark.parametrize(
    ("recipe", "name", "part"),
    [
        case
        for case in CASES
        if is_swept(str(case)) or (case[1] in EVER_FAILED and case[2] == "validation")
    ],
)
def test_tables(recipe, name, part, call, tmp_path, wordpiece_folder, tokenizer_folder):
    main, text, rows, _ = FINETUNING[recipe]
    if recipe == "question_answering" and name in ("header twice", "jsonl as csv"):
        text = "context"
    good = tmp_path / "good.jsonl"
    good.write_bytes(lines(rows))
    path, message = write(tmp_path, name, TABLES, rows, text)
    data = {f"{p}_data": [{"path": str(path if p == part else good)}] for p in PARTS}
    words = finetuning_words(recipe, tmp_path / "run", data, wordpiece_folder, tokenizer_folder)
    ended = call(main, words, tmp_path / "run")
    if recipe == "question_answering" and name == "missing":
        message = "line 2: no column"
    assert_refused(ended, path, message)


def pretraining_words(
    recipe: str, folder: Path, sources: dict[str, Path], tokenizers: dict[str, Path], **more: Any
) -> tuple[Callable, list[str]]:
    main, settings = PRETRAINING[recipe]
    parts = PARTS[:2] if recipe == "train_tokenizer" else PARTS
    data = {f"{part}_sources": [{"path": str(sources[part])}] for part in parts}
    if recipe in tokenizers:
        settings = {**settings, "tokenizer": str(tokenizers[recipe])}
        more = {"max_steps": 2, "lr_scheduler_type": "constant", **more}
    return main, command_line({"output_dir": folder, **settings, **data, **more})


@pytest.fixture
def tokenizers(tokenizer_folder: Path, wordpiece_folder: Path) -> dict[str, Path]:
    return {"causal_lm": tokenizer_folder, "bert": wordpiece_folder}


# nothing bad, or lines by the dozen, of which 20 are named
QUIET = ("empty", "blank", "garbage.jsonl", "utf-16", "parquet as jsonl")
SOURCE_CASES = [
    (recipe, name, part)
    for recipe in PRETRAINING
    for name in SOURCES
    for part in PARTS
    # of what is trained on, the first document is looked at
    if (recipe, part) != ("train_tokenizer", "test")
]


@pytest.mark.parametrize(
    ("recipe", "name", "part"),
    [
        case
        for case in SOURCE_CASES
        if is_swept(str(case)) or (case[1] in EVER_FAILED and case[2] == "validation")
    ],
)
def test_sources(recipe, name, part, call, tmp_path, tokenizers, monkeypatch):
    good = tmp_path / "good.jsonl"
    good.write_bytes(lines(PROSE))
    rows = PROSE if part != "train" and recipe != "train_tokenizer" else PROSE[1:]
    path, message = write(tmp_path, name, SOURCES, rows, "text")
    if part == "train" or recipe == "train_tokenizer":
        # of what streams, the first document is looked at before the first step
        content = path.read_bytes()
        if name in ("null", "number", "missing", "no mapping", "surrogate", "cut line", "deep"):
            path.write_bytes(
                content.split(b"\n")[-1 if name == "cut line" else 1] + b"\n" + content
            )
            message = message.replace("line 2", "line 1")
        elif name == "parquet null":
            path.write_bytes(
                parquet([{**PROSE[0], "text": None}, PROSE[1], {**PROSE[0], "text": None}])
            )
            message = "row 0: .*null"
    main, words = pretraining_words(
        recipe,
        tmp_path / "run",
        {p: path if p == part else good for p in PARTS},
        tokenizers,
    )
    assert_refused(call(main, words, tmp_path / "run"), path, message)


@pytest.mark.parametrize("recipe", PRETRAINING)
def test_bad_records_and_files_are_left_out(recipe, call, tmp_path, tokenizers):
    """Of what is trained on, validated and tested on alike; each is named."""
    folders = {}
    bad: dict[str, list[Path]] = {}
    for number, part in enumerate(PARTS):
        folders[part] = tmp_path / part
        folders[part].mkdir()
        make = make_documents if recipe == "causal_lm" else make_prose
        (folders[part] / "good.jsonl").write_bytes(lines(make(part, 24, number)))
        names = [name for name in SOURCES if name not in QUIET]
        bad[part] = [write(folders[part], name, SOURCES, PROSE[:3], "text")[0] for name in names]
    steps = {} if recipe == "train_tokenizer" else {"max_steps": 20, "report_to": []}
    main, words = pretraining_words(
        recipe, tmp_path / "run", folders, tokenizers, on_bad_record="skip", **steps
    )
    ended = call(main, words, tmp_path / "run")
    assert ended.status == 0, ended.error
    for part in PARTS[:2] if recipe == "train_tokenizer" else PARTS:
        named = [path.name for path in bad[part] if str(path) in ended.error]
        assert named == [path.name for path in bad[part]], part
    if recipe != "train_tokenizer":
        assert any("eval_loss" in record for record in metrics(tmp_path / "run"))


class PanicException(BaseException):
    """What a panic in Rust is here: pyo3_runtime gives out its own only when there is one."""


@pytest.mark.parametrize("recipe", FINETUNING)
@pytest.mark.parametrize("error", [PanicException, Exception])
def test_rows_on_which_the_tokenizer_fails(
    recipe, error, call, tmp_path, wordpiece_folder, tokenizer_folder, monkeypatch
):
    main, text, rows, _ = FINETUNING[recipe]
    (tmp_path / "good.jsonl").write_bytes(lines(rows[:20]))
    (tmp_path / "bad.jsonl").write_bytes(lines(rows[20:]))
    encode, mark = PreTrainedTokenizerFast._encode_plus, rows[22][text]

    def fail(self, *arguments, **options):
        if mark in str((arguments, options)):
            raise error("retry-limit-in-match over")
        return encode(self, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", fail)
    names = {"train_data": "good", "validation_data": "bad"}
    data = {key: [{"path": str(tmp_path / f"{name}.jsonl")}] for key, name in names.items()}
    folder = tmp_path / "run"
    words = finetuning_words(recipe, folder, data, wordpiece_folder, tokenizer_folder)
    ended = call(main, words, folder)
    assert (ended.status, folder.exists()) == (2, False)
    assert ended.error.startswith(f"error: {tmp_path / 'bad.jsonl'}, line 3")
    assert ended.error.endswith(": the tokenizer fails on it: retry-limit-in-match over\n")


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    template = (CHAT_TEMPLATES / "plain.jinja").read_text()
    path = tmp_path / "own.jinja"
    path.write_text(template, encoding="utf-8-sig")
    set_chat_template(tokenizer, ConversationArguments(chat_template=str(path)))
    assert tokenizer.chat_template == template


@pytest.mark.parametrize("recipe", FINETUNING)
def test_rows_that_are_held_out_and_trained_on(
    recipe, call, tmp_path, wordpiece_folder, tokenizer_folder
):
    main, text, rows, _ = FINETUNING[recipe]
    parts = {"train": rows[:20], "validation": rows[20:], "test": [rows[21], rows[3]]}
    data = {}
    for part, of_part in parts.items():
        (tmp_path / f"{part}.jsonl").write_bytes(lines(of_part))
        data[f"{part}_data"] = [{"path": str(tmp_path / f"{part}.jsonl")}]
    folder, tokenizers = tmp_path / "run", (wordpiece_folder, tokenizer_folder)
    words = finetuning_words(recipe, folder, data, *tokenizers, on_leaked_rows="fail")
    ended = call(main, words, folder)
    assert (ended.status, folder.exists()) == (2, False)
    assert ended.error.startswith(
        "error: on_leaked_rows: 1 of 2 test rows stand in train_data too, the first: "
    )
    assert rows[3][text].split()[0] in ended.error
    del data["validation_data"]
    words = finetuning_words(recipe, folder, data, *tokenizers, validation_split=1e-9)
    ended = call(main, words, folder)
    assert ended.error.startswith("error: validation_split: 1e-09 of 20 rows, by their hashes, ")


@pytest.mark.parametrize("part", ["model_name_or_path", "tokenizer"])
@pytest.mark.parametrize("recipe", [*FINETUNING, "causal_lm", "bert"])
def test_code_beside_a_model_or_tokenizer_is_not_run(
    recipe, part, call, tmp_path, tokenizers, monkeypatch
):
    """Nobody is asked whether it may."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    bad, marker, good = tmp_path / "bad", tmp_path / "it-ran", tmp_path / "good.jsonl"
    shutil.copytree(tokenizers["bert"], bad)
    (bad / "own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    kinds = ("Config", "ModelForCausalLM", "ModelForMaskedLM", "ModelForPreTraining")
    code = {f"Auto{kind}": "own.Own" for kind in kinds}
    (bad / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
    code = {"AutoTokenizer": [None, "own.Own"]}
    (bad / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": code})
    )
    more = {part: str(bad)} | ({"model": {}} if part != "tokenizer" else {})
    if recipe in FINETUNING:
        main, _, rows, _ = FINETUNING[recipe]
        good.write_bytes(lines(rows))
        data = {f"{p}_data": [{"path": str(good)}] for p in PARTS[:2]}
        words = finetuning_words(recipe, tmp_path / "run", data, *reversed(tokenizers.values()))
    else:
        good.write_bytes(lines(PROSE))
        sources = {p: good for p in PARTS}
        main, words = pretraining_words(recipe, tmp_path / "run", sources, tokenizers)
    ended = call(main, [*words, *command_line(more)], tmp_path / "run")
    assert_refused(ended, bad, r"needs code of its own \(own.py\): .* trust_remote_code: true")
    assert not marker.exists()
