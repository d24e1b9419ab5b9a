"""What each script says of its settings: --help, and what it answers to others' names for them."""

import dataclasses
import inspect
import re
import sys
import typing
from importlib import import_module
from typing import Any

import peft
import pytest

from launching import ROOT
from utils.config import ELSEWHERE, InputError, parse
from utils.program import declared
from utils.sources import Source
from utils.tables import Table

SCRIPTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(ROOT.glob("recipes/*/*.py"))
    if "command(main)" in path.read_text()
]
VALUES = {  # of what is required
    "train_sources": "[{path: a.jsonl}]",
    "train_data": "[{path: a.jsonl}]",
    "teacher": "{model_name_or_path: a}",
    "model_name_or_path": "a",
    "tokenizer": "a",
    "max_steps": "1",
    "output_dir": "a",
    "algorithm": "bpe",
    "prompt": "a",
    "script": "a",
    "config": "a",
    "settings": "{learning_rate: [1, 2]}",
    "trials": "1",
}
# a heading, and the indented and empty lines below it
SECTION = re.compile(r"^(\S.*):\n( .*\n(?:(?: .*)?\n)*)", re.MULTILINE)
ROW = re.compile(r"^  (--\w+|\.\w+)\s+(\S.*(?:\n {6,}\S.*)*)", re.MULTILINE)


def kinds(script: str) -> tuple[type, ...]:
    settings = import_module(script).Arguments
    return settings if isinstance(settings, tuple) else (settings,)


def names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__[1:] if dataclasses.is_dataclass(base)]


@pytest.fixture
def shown(capsys, monkeypatch):
    """shown(script): its --help."""

    def text(script: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{script.replace('.', '/')}.py"])
        with pytest.raises(SystemExit):
            parse(kinds(script), ["--help"])
        return capsys.readouterr().out

    return text


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_fits_a_terminal_and_begins_with_what_is_required(script, shown):
    lines = shown(script).splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert lines[0] == f"usage: {script.rpartition('.')[2]}.py [CONFIG.yaml] [--key value …]"
    start = " ".join(" ".join(lines[:10]).split())
    for kind in kinds(script):
        _, _, needs = start.partition(f"{' '.join(kind.__doc__.split())} Required: ")
        needs = needs.partition(".")[0].split("; ")
        required = [need.partition(",")[0] for need in needs if need != "nothing"]
        parse(kind, [word for name in required for word in (f"--{name}", VALUES[name])])  # enough
        for name in {*required} - {"train_sources"}:  # which is missed when they are opened
            others = [n for n in required if n != name]
            with pytest.raises(InputError, match=name):
                parse(kind, [word for n in others for word in (f"--{n}", VALUES[n])])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_shows_each_setting_once_and_where_it_is_declared(script, shown):
    sections = [(heading, ROW.findall(rows)) for heading, rows in SECTION.findall(shown(script))]
    assert sections[0][0] in ("What most runs set", "Settings")
    rows = [row for _, rows in sections for row in rows if row[0].startswith("--")]
    assert len({*rows}) == len(rows)  # two kinds of runs share what is the same in both
    assert {*dict(rows)} == {f"--{name}" for kind in kinds(script) for name in names(kind)}
    if len(kinds(script)) == 1:
        assert len(dict(rows)) == len(rows)
    for base in {base for kind in kinds(script) for base in bases(kind)}:
        own = {f"--{name}" for name in {*names(base)}.difference(*map(names, bases(base)))}
        title = inspect.cleandoc(base.__doc__).partition("\n\n")[0].removesuffix(".")
        assert {name for heading, rows in sections if heading == title for name, _ in rows} <= own


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_explains_what_is_inside_of_settings_once(script, shown):
    sections = SECTION.findall(shown(script))
    headings, found = [heading for heading, _ in sections], dict(sections)
    hints = [hint for kind in kinds(script) for hint in typing.get_type_hints(kind).values()]
    parts = set().union(*map(dataclasses_of, hints))
    for part in parts:
        assert headings.count(part.__name__) == 1
        rows = ROW.findall(found[part.__name__])
        assert [name for name, _ in rows] == [f".{name}" for name in names(part)]
    assert sum("\n  ." in rows for _, rows in sections) == len(parts)


def dataclasses_of(hint: Any) -> set[type]:
    """Those that a type is made of."""
    inner = map(dataclasses_of, typing.get_args(hint))
    return {hint} if dataclasses.is_dataclass(hint) else set().union(*inner)


ANSWERS = {
    name: ours.split(" | ")
    for theirs, _, ours in (line.partition(": ") for line in re.split("; |\n", ELSEWHERE.strip()))
    for name in theirs.split()
}


@pytest.mark.parametrize("theirs", ANSWERS)
def test_a_name_of_others_is_answered_with_a_setting_that_the_recipe_has(theirs):
    settings = [*(kind for script in SCRIPTS for kind in kinds(script)), Source, Table]
    answers = set()
    for kind in settings:
        keys = {answer: answer.partition(": ")[0] for answer in ANSWERS[theirs]}
        hints = {answer: declared(kind, key)[1] for answer, key in keys.items()}
        own = [answer for answer in hints if hints[answer] is not None]
        if own and theirs not in names(kind):
            with pytest.raises(InputError) as error:
                parse(kind, [f"--{theirs}", "1"])
            assert str(error.value) == f"--{theirs}: unknown key {theirs!r}: here it is {own[0]!r}"
            answers |= {*own}
            value = own[0].partition(": ")[2]
            choices = typing.get_args(hints[own[0]])
            assert not value or value in choices or str in choices
    assert answers == {*ANSWERS[theirs]} - {theirs}  # each is of some recipe


def test_names_of_lora_are_those_of_peft():
    answers = [ours.removeprefix("lora.") for (ours, *_) in ANSWERS.values() if "lora." in ours]
    assert len(answers) > 3
    assert {*answers} <= {*names(peft.LoraConfig)}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("per_device_eval_batch_size", "per_device_batch_size"),
        ("num_warmup_steps", "warmup_steps"),
        ("max_train_steps", "max_steps"),
        ("lr_scheduler", "lr_scheduler_type"),
        ("optimizer", "optim"),
        ("eval_interval", "eval_steps"),
        ("save_strategy", "save_steps"),
        ("logging_strategy", "logging_steps"),
        ("activation_checkpointing", "gradient_checkpointing"),
        ("tokenizer_name", "tokenizer"),
        ("model_name", "model_name_or_path"),
        ("sample_packing", "packing"),
        ("compile", "torch_compile"),
        ("out_dir", "output_dir"),
    ],
)
def test_some_names_of_others_are_the_nearest(theirs, ours):
    for script in ("recipes.causal_lm.pretrain", "recipes.causal_lm.finetune"):
        with pytest.raises(InputError, match=f"the nearest valid one is '{ours}'"):
            parse(kinds(script), [f"--{theirs}", "1"])


def test_a_name_of_others_is_answered_in_a_file_and_inside_of_settings(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("train_data:\n- dataset_name: a\n")
    expected = "line 2: unknown key 'train_data.0.dataset_name': here it is 'train_data.0.path'"
    with pytest.raises(InputError, match=expected):
        parse(kinds("recipes.causal_lm.finetune"), [str(config)])
