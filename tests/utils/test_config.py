"""utils/config.py: what is read, from where, and what is said of input that is wrong."""

import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from utils import sources
from utils.config import InputError, as_yaml, looked_for, parse, read_yaml
from utils.sources import find_files
from utils.tables import Table, read_table

ROOT = Path(__file__).parents[2]


@dataclass
class Source:
    """One entry of the mixture."""

    path: str  # a file of JSON lines
    weight: float = 1.0  # its share of the tokens


@dataclass
class Optimizer:
    """How weights move."""

    name: Literal["adamw", "sgd"] = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.1  # not on norms and biases


@dataclass
class Arguments:
    """Train a model.

    The text after the first line is shown as well.
    """

    output_dir: str  # where everything goes
    max_steps: int = 20  # optimizer steps
    learning_rate: float = 3e-4  # the peak, after warmup
    bf16: bool = False
    mixed_precision: Literal["no", "bf16"] = "no"
    # Continue from the newest checkpoint,
    # or refuse a folder that has one.
    resume: Literal["auto", "never"] = "auto"
    revision: str | None = None
    max_tokens: int | None = None  # null: no limit
    seed: str | int = 0
    prompt: str | list[str] | None = None
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(weight_decay=0.2))
    sources: list[Source] = field(default_factory=list)  # what is read
    model: dict[str, Any] = field(default_factory=lambda: {"hidden_size": 64, "layers": 2})
    averages: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        if self.bf16 and self.mixed_precision == "bf16":
            raise InputError("bf16 and mixed_precision say the same: keep one of them")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A function that writes config.yaml, in the folder where the test then runs."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("config.yaml").write_text(text, encoding="utf-8")
        return "config.yaml"

    return write


def read(*words: str) -> Arguments:
    return parse(Arguments, list(words))


def value_of(key: str, *words: str) -> Any:
    return getattr(read("--output_dir", "out", *words), key)


def message(settings: type, *words: str) -> str:
    with pytest.raises(InputError) as error:
        parse(settings, list(words))
    return str(error.value)


# what is read


def test_defaults_give_way_to_the_file_and_the_file_to_the_command_line(config):
    name = config("output_dir: from_file\nmax_steps: 30\nlearning_rate: 0.1\n")
    args = read(name, "--learning_rate", "0.2", "--revision=main=1")
    assert (args.resume, args.bf16, args.max_tokens) == ("auto", False, None)
    assert (args.output_dir, args.max_steps) == ("from_file", 30)
    assert (args.learning_rate, args.revision) == (0.2, "main=1")


def test_the_last_of_two_options_counts():
    assert value_of("max_steps", "--max_steps", "1", "--max_steps", "2") == 2


def test_an_empty_file_sets_nothing(config):
    assert read(config("# only a comment\n"), "--output_dir", "a") == Arguments("a")


def test_two_reads_share_no_default():
    read("--output_dir", "a").sources.append("x")
    assert value_of("sources") == []


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.e-4", ".3e-3", "+0.0003", "30.0e-5"])
@pytest.mark.parametrize("place", ["file", "command line", "inside a mapping"])
def test_numbers_with_exponents_are_numbers_everywhere(config, text, place):
    if place == "file":
        value = read(config(f"output_dir: out\nlearning_rate: {text}\n")).learning_rate
    elif place == "command line":
        value = value_of("learning_rate", "--learning_rate", text)
    else:
        value = read(config(f"output_dir: out\nmodel: {{rms_norm_eps: {text}}}\n")).model
        value = value["rms_norm_eps"]
    assert type(value) is float
    assert value == 3e-4


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("max_steps", "-3", -3),
        ("max_steps", "1_000_000", 1_000_000),
        ("learning_rate", "1", 1.0),
        ("learning_rate", ".inf", float("inf")),
        ("bf16", "true", True),
        ("bf16", "True", True),
        ("bf16", "FALSE", False),
        ("mixed_precision", "no", "no"),  # false, if it were YAML 1.1
        ("revision", "2024-01-31", "2024-01-31"),  # a date, if it were
        ("revision", "0123456", "0123456"),  # 42798, if it were
        ("revision", "31_01_2024", "31_01_2024"),
        ("revision", "12:30", "12:30"),
        ("revision", "yes", "yes"),
        ("revision", "1234567", "1234567"),
        ("revision", "null", None),
        ("max_tokens", "null", None),
        ("max_tokens", "5", 5),
        ("averages", "{ema: 1, sma: 2.5}", {"ema": 1.0, "sma": 2.5}),
        ("model", "{a: [1, 2.5, x, null, 0x10]}", {"a": [1, 2.5, "x", None, "0x10"]}),
        ("optimizer", "{betas: [0.5, 1]}", Optimizer(betas=[0.5, 1.0])),
        ("sources", "[{path: a}]", [Source("a")]),
    ],
)
@pytest.mark.parametrize("place", ["file", "command line"])
def test_values(config, place, key, text, expected):
    if place == "file":
        value = getattr(read(config(f"output_dir: out\n{key}: {text}\n")), key)
    else:
        value = value_of(key, f"--{key}", text)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "text", ["def ", "class A:", "# a comment", "", "- a", "'quoted'", "a\nb", "1.10", "~", "[x"]
)
def test_text_on_the_command_line_stands_as_it_is(text):
    assert value_of("revision", "--revision", text) == text
    assert value_of("prompt", "--prompt", text) == text
    assert read("--output_dir", text).output_dir == text
    sources = value_of("sources", "--sources", "[{path: a}]", "--sources.0.path", text)
    assert sources == [Source(text)]


@dataclass
class Evaluated:
    whole_words: bool = False


@dataclass
class Flags:
    quiet: bool = False
    loud: bool | None = None
    max_steps: int = 20
    optimizer: Optimizer = field(default_factory=Optimizer)
    inner: list[Evaluated] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, float] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--quiet"], Flags(quiet=True)),
        (["--quiet", "--loud"], Flags(quiet=True, loud=True)),
        (["--quiet", "--max_steps", "3", "--loud"], Flags(True, True, 3)),
        (["--quiet", "--quiet=false", "--loud=true"], Flags(loud=True)),
        (["--quiet", "false", "--loud", "null"], Flags()),
        (["--inner", "[{}]", "--inner.0.whole-words"], Flags(inner=[Evaluated(True)])),
        (["--max-steps", "3"], Flags(max_steps=3)),
        (["--optimizer.weight-decay", "1"], Flags(optimizer=Optimizer(weight_decay=1.0))),
        (["--model.a-b", "8", "--model.c-d.e-f=9"], Flags(model={"a_b": 8, "c_d": {"e_f": 9}})),
        (["--labels.not-toxic", "2"], Flags(labels={"not-toxic": 2.0})),  # a name of the data
    ],
)
def test_flags_alone_are_true_and_dashes_stand_for_underscores(words, expected):
    assert parse(Flags, words) == expected


@dataclass
class Evaluation:
    output_dir: str
    split: str = "test"
    batch_size: int = 1


def test_of_several_kinds_of_settings_the_keys_choose_one(config):
    kinds = (Arguments, Evaluation)
    assert parse(kinds, ["--output_dir", "out", "--split", "a"]) == Evaluation("out", "a")
    assert parse(kinds, ["--output_dir", "out"]).max_steps == 20
    both = config("output_dir: out\nmax_steps: 2\nseed: 1\n")
    with pytest.raises(InputError, match="'split' does not go with 'max_steps': two kinds of runs"):
        parse(kinds, [both, "--split", "a"])
    with pytest.raises(InputError, match="unknown key 'splt': the nearest valid one is 'split'"):
        parse(kinds, ["--output_dir", "out", "--batch_size", "2", "--splt", "a"])


def test_a_union_keeps_the_type_that_the_file_gives(config):
    assert read(config("output_dir: out\nseed: 5\n")).seed == 5
    assert read(config("output_dir: out\nseed: '5'\n")).seed == "5"
    assert read(config("output_dir: out\nprompt: [a, b]\n")).prompt == ["a", "b"]


def test_dotted_keys_reach_into_what_the_file_sets(config):
    name = config(
        "output_dir: out\n"
        "optimizer: {name: sgd, betas: [0.1, 0.2]}\n"
        "sources:\n"
        "- {path: a, weight: 2}\n"
        "- path: b\n"
        "model: {hidden_size: 8, rope: {theta: 1e4}}\n"
    )
    words = ["--optimizer.betas.1", "0.3", "--sources.1.weight", "5", "--sources.0.path", "c"]
    args = read(name, *words, "--model.rope.theta", "1e6", "--model.new.deep", "x")
    assert args.optimizer == Optimizer(name="sgd", betas=[0.1, 0.3])
    assert args.sources == [Source("c", 2.0), Source("b", 5.0)]
    assert args.model == {"hidden_size": 8, "rope": {"theta": 1e6}, "new": {"deep": "x"}}


def test_dotted_keys_reach_into_defaults():
    words = ["--model.hidden_size", "128", "--optimizer.betas.0", "0.5"]
    args = read("--output_dir", "out", *words)
    assert args.model == {"hidden_size": 128, "layers": 2}
    assert args.optimizer == Optimizer(betas=[0.5, 0.95], weight_decay=0.2)
    assert value_of("model") == {"hidden_size": 64, "layers": 2}


def test_a_whole_value_replaces_what_was_there(config):
    name = config("output_dir: out\nmodel: {a: 1, b: 2}\n")
    assert read(name, "--model", "{c: 3}", "--model.d", "4").model == {"c": 3, "d": 4}


@pytest.mark.parametrize("text", ["a.jsonl", "[a.jsonl]", "{path: a.jsonl}", "[{path: a.jsonl}]"])
def test_a_path_alone_is_a_source(config, text):
    expected = [Source("a.jsonl")]
    assert parse(Arguments, [config(f"output_dir: out\nsources: {text}\n")]).sources == expected
    words = ["--output_dir", "out", "--sources", text]
    assert parse(Arguments, words).sources == expected
    words += ["--sources.0.weight", "2"]
    assert parse(Arguments, words).sources == [Source("a.jsonl", weight=2.0)]
    given = config(f"output_dir: out\nsources: {text}\n")
    weighed = parse(Arguments, [given, "--sources.0.weight", "2"])
    assert weighed.sources == [Source("a.jsonl", weight=2.0)]


def test_anchors_and_merge_keys(config):
    name = config(
        "output_dir: out\nsources:\n- &first {path: a, weight: 2}\n- {<<: *first, path: b}\n"
    )
    assert read(name).sources == [Source("a", 2.0), Source("b", 2.0)]


@pytest.mark.parametrize(
    "text", ["1e5", "12e4567", "no", "null", "~", "2024-01-31", "0123", "a: b"]
)
def test_what_as_yaml_writes_is_read_back_equal(tmp_path, text):
    args = Arguments(
        output_dir=text,
        learning_rate=1e-5,
        revision=text,
        seed=text,
        prompt=[text, "línea\nnaïve ☃"],
        optimizer=Optimizer(betas=[1e20, float("inf")]),
        sources=[Source(text, 0.1), Source("b")],
        model={"eps": 1e-5, "name": text, "none": None, "flag": True, "long": "word " * 50},
    )
    path = tmp_path / "config.yaml"
    path.write_text(as_yaml(args))
    assert parse(Arguments, [str(path)]) == args
    # any other YAML reader gets the same
    assert yaml.safe_load(path.read_text()) == asdict(args)


# what is refused


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "learning_rat: 1",
            "config.yaml, line 2: unknown key 'learning_rat': the nearest valid one is "
            "'learning_rate'",
        ),
        (
            "\n\noptimizer:\n  weightdecay: 1",
            "config.yaml, line 5: unknown key 'optimizer.weightdecay': the nearest valid one is "
            "'optimizer.weight_decay'",
        ),
        (
            "sources:\n- path: a\n- pth: b",
            "config.yaml, line 4: unknown key 'sources.1.pth': the nearest valid one is "
            "'sources.1.path'",
        ),
        (
            "sources:\n- weight: 1",
            "config.yaml, line 3: sources.0.path is missing: it has no default",
        ),
        (
            "max_steps: 1\nbf16: true\nmax_steps: 2",
            "config.yaml, line 4: 'max_steps' is set twice (also: config.yaml, line 2)",
        ),
        (
            "optimizer:\n  name: sgd\n  name: sgd",
            "config.yaml, line 4: 'optimizer.name' is set twice (also: config.yaml, line 3)",
        ),
        ("max_steps: many", "config.yaml, line 2: max_steps must be a whole number, not 'many'"),
        ("max_steps: 1.5", "config.yaml, line 2: max_steps must be a whole number, not 1.5"),
        ("max_steps: 1e6", "config.yaml, line 2: max_steps must be a whole number, not 1000000.0"),
        ("max_steps: true", "config.yaml, line 2: max_steps must be a whole number, not True"),
        ("max_steps: '3'", "config.yaml, line 2: max_steps must be a whole number, not '3'"),
        ("max_steps:", "config.yaml, line 2: max_steps must be a whole number, not None"),
        ("max_tokens: x", "config.yaml, line 2: max_tokens must be a whole number, not 'x'"),
        ("learning_rate: x", "config.yaml, line 2: learning_rate must be a number, not 'x'"),
        ("learning_rate: true", "config.yaml, line 2: learning_rate must be a number, not True"),
        ("learning_rate: [1]", "config.yaml, line 2: learning_rate must be a number, not [1]"),
        ("bf16: 1", "config.yaml, line 2: bf16 must be true or false, not 1"),
        ("bf16: yes", "config.yaml, line 2: bf16 must be true or false, not 'yes'"),
        ("revision: 1.10", "config.yaml, line 2: revision must be text, not 1.1"),
        ("revision: true", "config.yaml, line 2: revision must be text, not True"),
        ("revision: {a: b}", "config.yaml, line 2: revision must be text, not {'a': 'b'}"),
        ("resume: no", 'config.yaml, line 2: resume must be "auto" or "never", not \'no\''),
        (
            "prompt: {a: b}",
            "config.yaml, line 2: prompt must be text or a list of text or null, not {'a': 'b'}",
        ),
        ("sources: 3", "config.yaml, line 2: sources must be a list of Source, not 3"),
        ("sources: [3]", "config.yaml, line 2: sources.0 must be settings, not 3"),
        (
            "sources:\n- path: a\n  weight: heavy",
            "config.yaml, line 4: sources.0.weight must be a number, not 'heavy'",
        ),
        (
            "optimizer:\n  betas:\n  - 0.9\n  - x",
            "config.yaml, line 5: optimizer.betas.1 must be a number, not 'x'",
        ),
        ("optimizer: sgd", "config.yaml, line 2: optimizer must be settings, not 'sgd'"),
        ("averages: 3", "config.yaml, line 2: averages must be a mapping, not 3"),
        (
            "averages: {ema: x}",
            "config.yaml, line 2: averages.ema must be a number, not 'x'",
        ),
        (
            "bf16: true\nmixed_precision: bf16",
            "bf16 and mixed_precision say the same: keep one of them",
        ),
    ],
)
def test_a_wrong_line_of_the_file_is_named(config, text, expected):
    assert message(Arguments, config(f"output_dir: out\n{text}\n")) == expected


NO_VALUE = "{} has no value: write --key value or --key=value"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "output_dir is missing: it has no default"),
        (
            ["--learning-rat", "1"],
            "--learning-rat: unknown key 'learning_rat': the nearest valid one is 'learning_rate'",
        ),
        (
            ["--optimizer.nam", "sgd"],
            "--optimizer.nam: unknown key 'optimizer.nam': the nearest valid one is "
            "'optimizer.name'",
        ),
        (["--max_steps"], NO_VALUE.format("--max_steps")),
        (["--max_steps", "--bf16"], NO_VALUE.format("--max_steps")),
        (["--output-dir", "--bf16", "true"], NO_VALUE.format("--output-dir")),
        (["--model.tie_word_embeddings"], NO_VALUE.format("--model.tie_word_embeddings")),
        (["--bf17"], "--bf17: unknown key 'bf17': the nearest valid one is 'bf16'"),
        (["--bf16", "a.yaml"], "--bf16: bf16 must be true or false, not 'a.yaml'"),
        (
            ["--print_config", "a.yaml"],
            "--print_config: print_config must be true or false, not 'a.yaml'",
        ),
        (["--max_steps", "1", "2"], "unexpected '2': options are written --key value"),
        (["-x", "2"], "unexpected '-x': options are written --key value"),
        (["--max_steps", "x"], "--max_steps: max_steps must be a whole number, not 'x'"),
        (["--max_steps", ""], "--max_steps: max_steps must be a whole number, not None"),
        (["--max_steps", "[1"], "--max_steps: max_steps must be a whole number, not '[1'"),
        (["--max_steps.a", "1"], "--max_steps.a: max_steps is not a setting that holds others"),
        (
            ["--optimizer.name.a.b", "1"],
            "--optimizer.name.a.b: optimizer.name is not a setting that holds others",
        ),
        (
            ["--optimizer.betas.2", "1"],
            "--optimizer.betas.2: optimizer.betas.2 does not exist (2 entries, from 0)",
        ),
        (
            ["--sources.0.path", "a"],
            "--sources.0.path: sources.0 does not exist (0 entries, from 0)",
        ),
        (
            ["--optimizer.betas.last", "1"],
            "--optimizer.betas.last: optimizer.betas.last does not exist (2 entries, from 0)",
        ),
        (
            ["--optimizer.betas.0", "x"],
            "--optimizer.betas.0: optimizer.betas.0 must be a number, not 'x'",
        ),
        (
            ["--sources", "[{path: a, weight: x}]"],
            "--sources: sources.0.weight must be a number, not 'x'",
        ),
    ],
)
def test_a_wrong_option_is_named(words, expected):
    given = ["--output_dir", "out"] if words else []
    assert message(Arguments, *given, *words) == expected


def test_a_wrong_option_is_named_and_not_the_line_of_the_file_that_it_replaces(config):
    name = config("output_dir: out\noptimizer: {weight_decay: 0.1}\n")
    expected = "--optimizer: optimizer.weight_decay must be a number, not 'x'"
    assert message(Arguments, name, "--optimizer", "{weight_decay: x}") == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.yaml", None, "cannot read the config missing.yaml: No such file or directory"),
        (".", None, "cannot read the config .: Is a directory"),
        ("m.bin", b"\x80\x81", "m.bin is not YAML: it is not even text in UTF-8"),
        ("a.yaml", b"- a\n- b\n", "a.yaml holds no settings: expected lines of 'key: value'"),
        ("a.yaml", b"just words\n", "a.yaml holds no settings: expected lines of 'key: value'"),
        (
            "a.yaml",
            b"a: [1, 2\nb: 3\n",
            'a.yaml is not YAML: while parsing a flow sequence in "<unicode string>", line 1, '
            "column 4: a: [1, 2 ^ expected ',' or ']', but got ':' in \"<unicode string>\", "
            "line 2, column 2: b: 3 ^",
        ),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, monkeypatch, name, content, expected):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    assert message(Arguments, name).partition("; looked for from")[0] == expected


# what the program does

HELP = """\
usage: recipe.py [CONFIG.yaml] [--key value …]

Train a model. The text after the first line is shown as well. Required:
output_dir.

CONFIG.yaml holds lines of 'key: value', which options override. --key alone
means true. --print_config prints all settings as such a file and ends.

Settings:
  --output_dir       required: where everything goes (text)
  --max_steps        optimizer steps (a whole number, default 20)
  --learning_rate    the peak, after warmup (a number, default 0.0003)
  --bf16             (true or false, default false)
  --mixed_precision  ("no" or "bf16", default "no")
  --resume           Continue from the newest checkpoint, or refuse a folder
                     that has one. ("auto" or "never", default "auto")
  --revision         (text or null, default null)
  --max_tokens       null: no limit (a whole number or null, default null)
  --seed             (text or a whole number, default 0)
  --prompt           (text or a list of text or null, default null)
  --optimizer        (Optimizer, default {"name": "adamw", "betas": [0.9, 0.95],
                     "weight_decay": 0.2})
  --sources          what is read (a list of Source, default [])
  --model            (a mapping, default {"hidden_size": 64, "layers": 2})
  --averages         (a mapping, default {})

Optimizer:
  How weights move. Set by --optimizer.KEY value.

  .name              ("adamw" or "sgd", default "adamw")
  .betas             (a list of a number, default [0.9, 0.95])
  .weight_decay      not on norms and biases (a number, default 0.1)

Source:
  One entry of the mixture. Changed by --sources.0.KEY value.

  .path              required: a file of JSON lines (text)
  .weight            its share of the tokens (a number, default 1.0)

"""


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["no.yaml", "--max_steps", "x", "--help"]])
def test_help_lists_each_field_with_its_comment(capsys, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["recipes/some/recipe.py", *words])
    with pytest.raises(SystemExit) as end:
        read(*words)
    assert end.value.code == 0
    assert capsys.readouterr().out == HELP


def printed(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        read(*words)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_settings_are_printed_as_a_config_that_is_read_back(config, capsys):
    name = config("output_dir: out\nmax_steps: 30\nrevision: 'null'\nsources: [{path: a b}]\n")
    words = [name, "--learning_rate", "1e-5", "--model.layers", "3", "--prompt=--a\nb"]
    text = printed(capsys, *words, "--print_config")
    Path("printed.yaml").write_text(text)
    assert read("printed.yaml") == read(*words)
    assert text == as_yaml(read(*words))
    assert printed(capsys, name, "--print-config", "true") == as_yaml(read(name))
    assert read(name, "--print_config", "false").max_steps == 30


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("option", ["--help", "--print_config"])
def test_one_rank_prints(capsys, monkeypatch, rank, option):
    monkeypatch.setenv("RANK", rank)
    assert bool(printed(capsys, "--output_dir", "out", option)) == (rank == "0")


def test_settings_are_printed_after_their_checks(capsys):
    both = ["--bf16", "--mixed_precision", "bf16"]
    expected = "bf16 and mixed_precision say the same: keep one of them"
    assert message(Arguments, "--output_dir", "out", "--print_config", *both) == expected
    assert capsys.readouterr().out == ""


PROGRAM = """
import sys
from dataclasses import dataclass
from utils.config import InputError, command, parse

@dataclass
class Arguments:
    max_steps: int = 20
    fault: str = "none"

def main():
    args = parse(Arguments)
    print("read", args.max_steps)
    if args.fault == "interrupt":
        raise KeyboardInterrupt
    if args.fault == "bug":
        raise ValueError("a bug")
    if args.fault == "text":
        print("half of a pair: \\ud83d")
        raise InputError("a name: \\x1b[31mred\\n\\ud83d")

command(main)
"""


NOT_WHOLE = "--max_steps: max_steps must be a whole number, not '"


@pytest.mark.parametrize(
    ("words", "rank", "status", "output", "error"),
    [
        (["--max_steps", "3"], None, 0, "read 3\n", ""),
        (["--max_steps", "3"], "1", 0, "read 3\n", ""),
        (
            ["--max_step", "3"],
            None,
            2,
            "",
            "error: --max_step: unknown key 'max_step': the nearest valid one is 'max_steps'\n",
        ),
        (
            ["--max_steps", "x"],
            "0",
            2,
            "",
            "error: --max_steps: max_steps must be a whole number, not 'x'\n",
        ),
        (["--max_steps", "x"], "1", 2, "", ""),
        (["--fault", "interrupt"], None, 130, "read 20\n", ""),
        (
            ["--max_steps", "x" * 69_000 + "y"],
            None,
            2,
            "",
            f"error: {NOT_WHOLE}{'x' * (1500 - len(NOT_WHOLE))} … {'x' * 498}y'\n",
        ),
        (
            ["--fault", "text"],
            None,
            2,
            "read 20\nhalf of a pair: \\ud83d\n",
            "error: a name: \\x1b[31mred\\n\\ud83d\n",
        ),
    ],
)
def test_the_end_of_a_program(tmp_path, words, rank, status, output, error):
    done = run_program(tmp_path, words, rank)
    assert (done.returncode, done.stdout, done.stderr) == (status, output, error)


def test_a_bug_keeps_its_traceback(tmp_path):
    done = run_program(tmp_path, ["--fault", "bug"], "1")
    assert (done.returncode, done.stdout) == (1, "read 20\n")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: a bug\n")


def test_a_file_is_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    for name, value in (("LC_ALL", "C"), ("PYTHONUTF8", "0"), ("PYTHONCOERCECLOCALE", "0")):
        monkeypatch.setenv(name, value)
    (tmp_path / "config.yaml").write_text("max_steps: 3\nfault: naïve ☃\n", encoding="utf-8")
    done = run_program(tmp_path, [tmp_path / "config.yaml"], None)
    assert (done.returncode, done.stdout, done.stderr) == (0, "read 3\n", "")


def run_program(
    folder: Path, words: list[str | Path], rank: str | None
) -> subprocess.CompletedProcess:
    (folder / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment["PYTHONPATH"] = str(ROOT)
    if rank is not None:
        environment["RANK"] = rank
    return subprocess.run(
        [sys.executable, folder / "program.py", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_what_is_missing_where_a_run_is_started_is_said(tmp_path, monkeypatch):
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "project" / "data" / "a.jsonl").write_text("{}")
    (tmp_path / "project" / "run.yaml").write_text("a: 1")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "argv", ["script.py", "../project/run.yaml"])
    assert looked_for("data/b.jsonl") == f"; looked for from {elsewhere}"
    assert looked_for("/data/b.jsonl") == looked_for("s3://data/b.jsonl") == ""
    exists = f"exists from {tmp_path / 'project'}: start there, or give an absolute path"
    for path, failing in (
        ("data/*.jsonl", lambda: find_files(sources.Source("data/*.jsonl"))),
        ("data/a.jsonl", lambda: find_files(sources.Source("data/a.jsonl"))),
        ("data/a.jsonl", lambda: read_table(Table("data/a.jsonl"))),
    ):
        monkeypatch.chdir(elsewhere)
        with pytest.raises(InputError) as error:
            failing()
        named = str(error.value).rpartition("; ")[2].replace("/elsewhere/..", "")
        assert named == f"{path} {exists}"
    with pytest.raises(InputError, match=r"cannot read the config README.md: .*README.md exists"):
        read_yaml("README.md")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "a: &a [1, 2]\n"
            + "".join(
                f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghijk")
            ),
            "with its aliases (*name) it has more than 100,000 values",
        ),
        ("a: " + "[" * 5000 + "]" * 5000, "it is nested too deeply"),
        ("a: " + "{b: " * 5000 + "}" * 5000, "it is nested too deeply"),
        ("a: &a [*a]", "it is nested too deeply"),
        ("a: " + "x" * 2**20, "it has more than 1,048,576 bytes"),
    ],
    ids=["laughs", "lists", "mappings", "itself", "long"],
)
def test_yaml_without_a_bound(tmp_path, text, problem):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    start = time.monotonic()
    with pytest.raises(InputError) as error:
        read_yaml(str(file))
    assert str(error.value) == f"{file} is not YAML: {problem}"
    assert time.monotonic() - start < 20


def test_aliases_stand_for_what_they_name(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    assert read_yaml(str(file))[0] == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
