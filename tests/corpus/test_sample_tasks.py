"""recipes/corpus/sample_tasks.py: the parts on small texts, and the tasks of what is installed."""

import ast
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from datasets import load_dataset

import programs
from docstring_questions import questions
from installed_packages import DOCSTRING_DOMAINS, Definition
from programs import ROOT, documented_commands
from recipes.corpus import sample_tasks
from utils.config import InputError, parse

README = ROOT / "recipes/corpus/README.md"
BUILT = ROOT / "data/tasks"
PROGRAM = "recipes/corpus/sample_tasks.py"
ROWS = {
    "classification": (8000, 800, 800),
    "instruction": (6000, 300, 300),
    "question_answering": (5000, 500, 500),
    "summarization": (6000, 300, 300),
}
SPLITS = ("train", "validation", "test")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# the tasks of this installation, as `make setup` has built them


@pytest.fixture(scope="module")
def tasks() -> dict[str, dict[str, list[dict]]]:
    """Task → split → its rows."""
    return {
        task: {
            split: [json.loads(line) for line in (BUILT / task / f"{split}.jsonl").open()]
            for split in SPLITS
        }
        for task in ROWS
    }


def all_rows(splits: dict[str, list[dict]]) -> list[dict]:
    return [row for rows in splits.values() for row in rows]


def test_setup_has_built_every_split_in_full_and_nothing_else(tasks):
    assert set(contents(BUILT)) == sample_tasks.FILES
    for task, limits in ROWS.items():
        assert tuple(len(tasks[task][split]) for split in SPLITS) == limits, task
    assert sum(map(len, contents(BUILT).values())) < 40e6


def test_the_program_leaves_nothing_else_and_tells_the_rows_of_each_task(
    call, tmp_path, monkeypatch
):
    definitions = {"numpy": functions(0, 30), "scipy": functions(30, 20)}
    monkeypatch.setattr(sample_tasks, "DOCSTRING_DOMAINS", {"NumPy": "numpy", "SciPy": "scipy"})
    monkeypatch.setattr(sample_tasks.gc, "disable", lambda: None)  # it would stay so
    monkeypatch.setattr(sample_tasks, "installed", lambda name: name)
    monkeypatch.setattr(sample_tasks, "definitions", definitions.get)
    folder = tmp_path / "data" / "tasks"
    done = call(sample_tasks.main, ["--output_dir", str(folder)], folder)
    assert (done.status, done.error) == (0, "")
    assert set(contents(folder)) == sample_tasks.FILES
    assert list(folder.parent.iterdir()) == [folder]
    *lines, last = done.output.splitlines()
    rows = {words[0]: sum(map(int, words[1::2])) for words in map(str.split, lines[2:])}
    assert rows == {"classification": 0, "instruction": 50, **rows}
    assert list(rows) == list(ROWS)
    assert re.fullmatch(re.escape(f"{folder}: built in ") + r"\d+ s", last)


def test_no_text_is_in_two_splits_of_any_task(tasks):
    """A docstring or its code: the same text read in one task and in another has one split."""
    splits = defaultdict(set)
    for task in ROWS:
        for split, rows in tasks[task].items():
            for row in rows:
                text = row.get("text") or row.get("context") or row.get("document")
                if task == "instruction":
                    text = row["messages"][0]["content"].partition("\n\n")[2]
                splits[text].add(split)
                if task == "summarization":
                    splits[f"{row['summary']}\n\n{row['document']}"].add(split)
    assert len(splits) > 25_000
    assert max(map(len, splits.values())) == 1


def test_classification_is_balanced_and_no_text_occurs_twice(tasks):
    for split, count in zip(SPLITS, (1000, 100, 100), strict=True):
        labels = Counter(row["label"] for row in tasks["classification"][split])
        assert labels == dict.fromkeys(DOCSTRING_DOMAINS, count)
    texts = [row["text"] for row in all_rows(tasks["classification"])]
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) >= 100


def test_instruction_pairs_code_that_parses_with_a_summary(tasks):
    requests = Counter()
    codes = set()
    for row in all_rows(tasks["instruction"]):
        assert list(row) == ["messages", "source"]
        assert row["source"] in DOCSTRING_DOMAINS
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        request, code = re.fullmatch(
            r"(.*)\n\n```python\n(.*)\n```", user["content"], re.DOTALL
        ).groups()
        requests[request] += 1
        codes.add(code)
        [function] = ast.parse(code).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert assistant["content"] not in (ast.get_docstring(function) or "")
        assert 3 <= len(code.split("\n")) <= 60
        assert len(code) <= 2000
        assert sample_tasks.is_summary(assistant["content"])
    assert len(codes) == 6600
    assert set(requests) == set(sample_tasks.INSTRUCTIONS)
    assert min(requests.values()) > 1000


def test_answers_are_exact_spans_of_their_context(tasks):
    rows = all_rows(tasks["question_answering"])
    for row in rows:
        assert list(row) == ["id", "title", "context", "question", "answers"]
        texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
        assert len(texts) == len(starts)
        assert len(set(zip(texts, starts, strict=True))) == len(texts)
        for text, start in zip(texts, starts, strict=True):
            assert text
            assert text == text.strip()
            assert row["context"][start : start + len(text)] == text
        assert len(row["context"]) <= 6000
    assert len({row["id"] for row in rows}) == len(rows)
    lengths = sorted(len(row["context"]) for row in rows)
    assert lengths[-300] > 3500  # several windows
    assert sum(len(row["answers"]["text"]) > 1 for row in rows) > 200


def test_about_a_quarter_of_the_questions_asks_for_what_is_not_there(tasks):
    for rows in tasks["question_answering"].values():
        unanswered = [row for row in rows if not row["answers"]["text"]]
        assert 0.2 < len(unanswered) / len(rows) < 0.3
        for row in unanswered:
            owner = row["title"].partition(":")[2]
            names = set(re.findall("`([^`]+)`", row["question"])) - {owner}
            assert not names & set(re.findall(r"\w+", row["context"]))
            assert names or not re.search("return|yield", row["context"], re.IGNORECASE)


def test_summaries_are_one_sentence_and_not_in_their_document(tasks):
    for row in all_rows(tasks["summarization"]):
        assert list(row) == ["document", "summary", "source"]
        assert 20 <= len(row["summary"]) <= 200
        assert 200 <= len(row["document"]) <= 6000
        assert "\n" not in row["summary"]
        assert row["summary"].endswith(".")
        assert not row["summary"].startswith(("See ", ".. ", "Deprecated"))
        assert not row["document"].startswith(row["summary"])


def test_the_card_counts_what_is_there(tasks):
    card = (BUILT / "README.md").read_text(encoding="utf-8")
    for task, limits in ROWS.items():
        assert f"| {task} | {' | '.join(f'{limit:,}' for limit in limits)} |" in card
    for domain in DOCSTRING_DOMAINS:
        counts = []
        for task in ("classification", "instruction", "summarization"):
            column = "label" if task == "classification" else "source"
            counts.append(sum(row[column] == domain for row in all_rows(tasks[task])))
        one, two, four = (f"{count:,}" for count in counts)
        assert re.search(rf"^\| {domain} \| {one} \| {two} \| [\d,]+ \| {four} \|$", card, re.M)


def test_datasets_loads_each_task_by_name(tasks):
    for task, splits in tasks.items():
        loaded = load_dataset(str(BUILT), task, streaming=True)
        assert list(loaded) == list(SPLITS)
        assert next(iter(loaded["test"])) == splits["test"][0]


# small builds


def module(text: str, source: str = "toy.py") -> list[Definition]:
    """The functions and classes that a text defines at its top."""
    nodes = ast.parse(text).body
    return [Definition(node, f"{source}:{node.name}", text.split("\n")) for node in nodes]


def functions(first: int, count: int) -> list[Definition]:
    words = [f"word_{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(first, first + count)]
    body = "    y = {}(x)\n    return y\n"
    return [
        d
        for w in words
        for d in module(f'def f_{w}(x):\n    """Return the {w} of a value."""\n{body.format(w)}')
    ]


PAIR = """
import sys
from pathlib import Path
sys.path.insert(0, "recipes/corpus")
import sample_tasks
from installed_packages import definitions, installed
names = {"NetworkX": "networkx", "NumPy": "numpy"}
sample_tasks.build({d: definitions(installed(n)) for d, n in names.items()}, Path(sys.argv[1]))
print([name for name in ("networkx", "numpy", "torch") if name in sys.modules])
"""


def test_two_builds_are_equal_byte_for_byte_and_import_no_package(tmp_path):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # ASCII
    for name, environment in (
        ("a", {"PYTHONHASHSEED": "0"}),
        ("b", {"PYTHONHASHSEED": "1"} | plain),
    ):
        done = programs.start("-c", PAIR, tmp_path / name, **environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("\n[]\n")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len((tmp_path / "a/question_answering/train.jsonl").read_text().splitlines()) > 300


def test_a_function_more_moves_no_other_to_another_split(tmp_path):
    found = []
    for count in (200, 250):
        rows = sample_tasks.build({"NumPy": functions(0, count)}, tmp_path / "tasks")["instruction"]
        assert len(rows) == count
        found.append({row.of.source: row.of.split for row in rows})
    assert found[0].items() <= found[1].items()
    assert set(found[0].values()) == set(SPLITS)


def test_of_near_copies_the_first_is_kept(tmp_path):
    code = 'def f(x):\n    """Convert a {} to a list of {}."""\n    y = list(x)\n    return y\n'
    copies = [module(code.format(*words))[0] for words in (("Llama", "3"), ("Bert", "12"))]
    other = module(code.format("Bert", "words").replace("list(x)", "tuple(x)"))
    rows = sample_tasks.build({"NumPy": [*copies, *other]}, tmp_path / "tasks")["instruction"]
    assert sorted(row.of.docstring for row in rows) == [
        "Convert a Bert to a list of words.",
        "Convert a Llama to a list of 3.",
    ]


FUNCTION = '''\
class A:
    @cached(
        size=3,
    )
    async def f(self, x):  # why
        # a comment
        """One.

        Two.
        """

        y = """a
          b"""

        return x, y
'''


def code_of(text: str) -> str | None:
    node = ast.parse(text).body[0]
    node = node.body[0] if isinstance(node, ast.ClassDef) else node
    return sample_tasks.code_without_docstring(Definition(node, "a.py:f", text.split("\n")))


def test_code_without_docstring():
    assert code_of(FUNCTION) == (
        "@cached(\n    size=3,\n)\nasync def f(self, x):  # why\n    # a comment\n"
        '    y = """a\n      b"""\n\n    return x, y'
    )
    assert code_of(FUNCTION.replace("          b", "b")) is None
    documented = 'def f():\n    """One."""\n'
    assert code_of(documented + "    a = 1\n    return a\n") == "def f():\n    a = 1\n    return a"
    assert code_of(documented + "    return 1\n") is None  # two lines
    assert code_of(documented + "    pass\n    raise NotImplementedError\n") is None
    assert code_of(documented + "    a = 1\n" * 59) is not None
    assert code_of(documented + "    a = 1\n" * 60) is None
    assert code_of(documented + f"    a = 1\n    b = '{'x' * 2000}'\n") is None
    assert code_of("def f():\n    'One.'; a = 1\n    return a\n") is None
    assert code_of("class A:\n    class B:\n        'One.'\n        a = 1\n        b = 2\n") is None


@pytest.mark.parametrize(
    "text",
    [
        "Too short to.",
        "no capital at the beginning of it.",
        "A title without a full stop",
        "See numpy.foo for all of this.",
        "Deprecated since the last of versions.",
        "Of a {klass} that is filled in later.",
        "Add(input, other) -> Tensor of the sum.",
        "A paragraph of two lines.\n.. deprecated:: 1.2 and so on.",
    ],
)
def test_what_is_no_summary(text):
    assert not sample_tasks.is_summary(text)
    assert sample_tasks.is_summary("Seeds are drawn of a stream.")


CONTEXT = """\
Compute a norm.

Parameters
----------
x, y : array_like of shape (n,) or (n, m), default=None
    Input arrays. They are not changed.

kind : {'a', 'default'}, optional
    Which of both it is, e.g. the
    first. Defaults to ``'a'``.

    .. versionadded:: 1.8
**options
    Anything else.

Returns
-------
n : float
    The norm of the matrix.

Raises
------
ValueError
    If `x` is empty. Or not.
"""


def test_questions_and_their_answers():
    found = {
        (question.kind, question.name): [CONTEXT[start:end] for start, end in question.answers]
        for question in questions(CONTEXT)
    }
    array = "array_like of shape (n,) or (n, m)"
    about = {
        "type": [array, f"{array}, default=None"],
        "shape": ["(n,) or (n, m)"],
        "default": ["None"],
        "meaning": ["Input arrays"],
    }
    expected = {(kind, name): answers for name in "xy" for kind, answers in about.items()}
    assert found == expected | {
        ("type", "kind"): ["{'a', 'default'}", "{'a', 'default'}, optional"],
        ("default", "kind"): ["``'a'``"],
        ("meaning", "kind"): ["Which of both it is, e.g. the\n    first"],
        ("version", "kind"): ["1.8"],
        ("returned_type", ""): ["float"],
        ("returned", ""): ["The norm of the matrix"],
        ("raised", "ValueError"): ["If `x` is empty"],
    }


def test_defaults_that_contradict_each_other_are_no_answer():
    text = "Parameters\n----------\nx : int, default: 1\n    A number. Defaults to 2.\n"
    assert "default" not in {question.kind for question in questions(text)}


def test_templates_are_left_out(tmp_path):
    text = 'def f(x):\n    """Return the {} of a value."""\n    y = x\n    return y\n'
    found = sample_tasks.documented(
        {"NumPy": module(text.format("%(name)s")) + module(text.format("sum"))}
    )
    assert [of.docstring for of in found] == ["Return the sum of a value."]


# what is refused


def test_a_folder_with_other_content_is_not_replaced(tmp_path):
    folder = tmp_path / "tasks"
    sample_tasks.build({"NumPy": functions(0, 5)}, folder)
    sample_tasks.build({"NumPy": functions(0, 9)}, folder)
    (folder / "instruction/mine.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(InputError) as error:
        sample_tasks.build({"NumPy": functions(0, 5)}, folder)
    assert str(error.value) == (
        f"{folder} holds something else than sample tasks, which would be lost: "
        "remove it or give another folder with --output_dir"
    )
    assert contents(folder) == before


def test_an_interrupted_build_leaves_the_previous_tasks_and_nothing_else(tmp_path):
    folder = tmp_path / "tasks"
    sample_tasks.build({"NumPy": functions(0, 5)}, folder)
    before = contents(folder)

    def interrupted():
        yield from functions(5, 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_tasks.build({"NumPy": interrupted()}, folder)
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_domain_without_docstrings(tmp_path):
    with pytest.raises(InputError) as error:
        sample_tasks.build({"NumPy": functions(0, 5), "SciPy": []}, tmp_path / "tasks")
    assert str(error.value) == "found no docstring for SciPy: run `make setup`"
    assert list(tmp_path.iterdir()) == []


def test_the_program_names_bad_input_in_one_line_and_ends_with_2(tmp_path):
    (tmp_path / "file").write_text("mine")
    done = programs.start(PROGRAM, "--output_dir", tmp_path / "file")
    message = f"error: {tmp_path / 'file'} is a file: give another folder with --output_dir\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert (tmp_path / "file").read_text() == "mine"


# the documents that people copy commands from


def test_documented_commands_are_valid():
    commands = documented_commands(PROGRAM, sample_tasks.__doc__, README.read_text())
    assert len(commands) >= 3
    for words in commands:
        assert parse(sample_tasks.Arguments, words).output_dir in ("data/tasks", "/somewhere/else")
