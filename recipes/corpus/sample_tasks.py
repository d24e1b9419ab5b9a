"""Build labelled data for fine-tuning without a download: from the docstrings of what is installed.

    python recipes/corpus/sample_tasks.py
    python recipes/corpus/sample_tasks.py --output_dir /somewhere/else

Four tasks from eight scientific packages, one folder each with train.jsonl, validation.jsonl and
test.jsonl, one JSON object a line:

    classification        {"text": docstring, "label": "NumPy"}
    instruction           {"messages": [a function's code, its summary], "source": "NumPy"}
    question_answering    the columns of squad_v2; a quarter of the questions have no answer
    summarization         {"document": docstring, "summary": its first line, "source": "NumPy"}

Packages are parsed, never imported. A docstring's words decide which split it belongs to, the same
in all tasks, so that the same packages make the same files, byte for byte.
"""

import ast
import gc
import hashlib
import itertools
import json
import re
import signal
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

from dataset_folder import replaced_folder
from docstring_questions import POINTER, WORDINGS, Question, questions, without_answer
from installed_packages import DOCSTRING_DOMAINS, Definition, definitions, installed, versions
from utils.config import InputError, command, parse

MINIMUM_CHARACTERS = 100  # of a docstring to classify
MAXIMUM_CONTEXT = 6000
MAXIMUM_CODE = 2000
CODE_LINES = range(3, 61)
SPLITS = ("train", "validation", "test")
ROWS = {  # at most, of each split
    "classification": (8000, 800, 800),
    "instruction": (6000, 300, 300),
    "question_answering": (5000, 500, 500),
    "summarization": (6000, 300, 300),
}
FILES = {"README.md", *(f"{task}/{split}.jsonl" for task in ROWS for split in SPLITS)}
QUESTIONS_PER_CONTEXT = 2
INSTRUCTIONS = (
    "What does this Python function do?",
    "Summarize this Python function.",
    "Write the summary of this function's docstring.",
    "Explain in a sentence or two what this code does.",
    "Document the following function.",
)
TEMPLATE = re.compile(r"%\(\w+\)s")  # to be filled when the module is imported
# what is no summary: markup, a template to be filled, a doctest, a signature (or a POINTER)
MARKUP = re.compile(r"^\.\. |^ *[:@]\w|\{[\w.]*\}|>>>|->|^[-=]{3,}|^\w[\w.]*\(.*\)$", re.MULTILINE)
CARD = """\
---
language: en
task_categories:
- text-classification
- text-generation
- question-answering
- summarization
configs:
{configs}
---
# Sample tasks

Labelled data for fine-tuning, from the docstrings and the code of a Python installation, made by
`recipes/corpus/sample_tasks.py`. No text to read (`text`, the code in `messages`, `context`,
`document`) stands in two splits, and a docstring is in the same split of every task. Of docstrings
that differ in names and numbers only, one is kept. Each text is under the license of the package
that it comes from.

{table}

Built from {versions}.
"""


@dataclass
class Arguments:
    """Build labelled data for fine-tuning from the Python installation."""

    output_dir: str = "data/tasks"  # folder of the tasks; tasks that stand there are replaced


@dataclass(frozen=True)
class Documented:
    """A module, class or function with a docstring."""

    domain: str
    source: str  # the file, and the name in it
    docstring: str
    code: str | None  # without the docstring; of a function that makes a pair with it
    digest: bytes  # of the docstring's words: decides on the split and on the place in it

    @property
    def split(self) -> str:
        percent = int.from_bytes(self.digest[:8], "big") % 100
        return "test" if percent < 10 else "validation" if percent < 20 else "train"


class Row(NamedTuple):
    of: Documented
    text: str  # what is read: no two rows of a task have the same, but for names and numbers
    columns: dict[str, Any]


def main() -> None:
    args = parse(Arguments)
    gc.disable()  # syntax trees have no cycles, and looking for some takes 40% of the time
    start = time.perf_counter()
    packages = {domain: installed(name) for domain, name in DOCSTRING_DOMAINS.items()}
    tasks = build({d: definitions(p) for d, p in packages.items()}, Path(args.output_dir))
    for task, rows in tasks.items():
        counts = Counter(row.of.split for row in rows)
        print(f"{task:>18} " + "  ".join(f"{counts[split]:5,} {split}" for split in SPLITS))
    print(f"{args.output_dir}: built in {time.perf_counter() - start:.0f} s")


def build(domains: dict[str, Iterable[Definition]], output_dir: Path) -> dict[str, list[Row]]:
    """Write the tasks beside `output_dir` and move them there when they are whole.

    Raises:
        InputError: `output_dir` is a file, holds something else or cannot be written; a domain
            without docstrings.
    """
    with replaced_folder(output_dir, FILES, "sample tasks") as folder:
        found = documented(domains)
        rows = {
            "classification": map(classification, found),
            "instruction": map(instruction, found),
            "question_answering": question_answering(found),
            "summarization": map(summarization, found),
        }
        tasks = {task: select(task, filter(None, rows[task])) for task in ROWS}
        for task, rows in tasks.items():
            (folder / task).mkdir()
            for split in SPLITS:
                with open(folder / task / f"{split}.jsonl", "w", encoding="utf-8") as file:
                    for row in rows:
                        if row.of.split == split:
                            file.write(json.dumps(row.columns, ensure_ascii=False) + "\n")
        (folder / "README.md").write_text(card(tasks), encoding="utf-8")
    return tasks


def documented(domains: dict[str, Iterable[Definition]]) -> list[Documented]:
    """What has a docstring, in the order of the digests; of near-copies the first one found."""
    found: dict[bytes, Documented] = {}
    for domain, members in domains.items():
        start, before = time.perf_counter(), len(found)
        for definition in members:
            docstring = printable(ast.get_docstring(definition.node) or "").strip()
            digest = digest_of_words(docstring)
            if docstring and digest not in found and not TEMPLATE.search(docstring):
                code = code_without_docstring(definition)  # keeps no tree: all take gigabytes
                found[digest] = Documented(domain, definition.source, docstring, code, digest)
        count, seconds = len(found) - before, time.perf_counter() - start
        if not count:
            raise InputError(f"found no docstring for {domain}: run `make setup`")
        print(f"{domain:>18} {count:6,} docstrings {seconds:5.1f} s", flush=True)
    return [found[digest] for digest in sorted(found)]


def select(task: str, rows: Iterable[Row]) -> list[Row]:
    """The first rows of each split as far as `ROWS` goes; in classification, of each label."""
    groups = len(DOCSTRING_DOMAINS) if task == "classification" else 1
    limits = {split: limit // groups for split, limit in zip(SPLITS, ROWS[task], strict=True)}
    counts: Counter[tuple[str, str]] = Counter()
    seen = set()
    selected = []
    for row in rows:
        group = row.of.split, row.of.domain if groups > 1 else ""
        digest = digest_of_words(row.text)
        if digest not in seen and counts[group] < limits[row.of.split]:
            counts[group] += 1
            selected.append(row)
        seen.add(digest)
    return selected


def classification(of: Documented) -> Row | None:
    if len(of.docstring) < MINIMUM_CHARACTERS:
        return None
    return Row(of, of.docstring, {"text": of.docstring, "label": of.domain})


def instruction(of: Documented) -> Row | None:
    summary = re.split(r"\n\s*\n", of.docstring)[0]
    if not of.code or not is_summary(summary) or len(summary) > 500:
        return None
    request = INSTRUCTIONS[draw(len(INSTRUCTIONS), of.code)]
    messages = [
        {"role": "user", "content": f"{request}\n\n```python\n{of.code}\n```"},
        {"role": "assistant", "content": summary},
    ]
    return Row(of, of.code, {"messages": messages, "source": of.domain})


def code_without_docstring(definition: Definition) -> str | None:
    """The source of a function that does something, dedented."""
    node, _, lines = definition
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    docstring, *body = node.body
    if all(isinstance(statement, ast.Pass | ast.Raise | ast.Expr) for statement in body):
        return None  # abstract
    if body[0].lineno <= docstring.end_lineno:  # on one line
        return None
    start = min(part.lineno for part in (node, *node.decorator_list)) - 1
    rest = itertools.dropwhile(
        lambda line: not line.strip(), lines[docstring.end_lineno : node.end_lineno]
    )
    code = printable(textwrap.dedent("\n".join([*lines[start : docstring.lineno - 1], *rest])))
    if code[0].isspace() or "```" in code:  # a string in it begins further left
        return None
    if len(code) > MAXIMUM_CODE or code.count("\n") + 1 not in CODE_LINES:
        return None
    return code


def summarization(of: Documented) -> Row | None:
    summary, _, rest = of.docstring.partition("\n")
    document = rest.strip()
    if rest.partition("\n")[0].strip() or not is_summary(summary) or len(summary) > 200:
        return None
    if not 200 <= len(document) <= MAXIMUM_CONTEXT or document.startswith(".. deprecated"):
        return None
    columns = {"document": document, "summary": summary, "source": of.domain}
    return Row(of, document, columns)


def is_summary(text: str) -> bool:
    """Whether a paragraph is a whole sentence of prose."""
    return (
        len(text) >= 20
        and len(text.split()) >= 4
        and (text[0].isupper() or text[0] == "`")
        and text.endswith(".")
        and not MARKUP.search(text)
        and not POINTER.match(text)
    )


def question_answering(found: list[Documented]) -> Iterator[Row]:
    names: dict[str, set[str]] = {domain: set() for domain in DOCSTRING_DOMAINS}
    answerable: dict[bytes, list[Question]] = {}
    for of in found:
        if len(of.docstring) <= MAXIMUM_CONTEXT and ":" in of.source:
            answerable[of.digest] = list(questions(of.docstring))
            names[of.domain].update(q.name for q in answerable[of.digest] if len(q.name) > 2)
    strangers = {domain: sorted(members) for domain, members in names.items()}
    for of in found:
        asked = answerable.get(of.digest)
        if asked:
            yield from ask(of, asked, strangers[of.domain])


def ask(of: Documented, answerable: list[Question], strangers: list[str]) -> Iterator[Row]:
    """Some questions of different kinds about a docstring, about one in four without an answer."""
    context = of.docstring
    kinds = {question.kind for question in answerable}
    if not re.search("return|yield", context, re.IGNORECASE):
        kinds.add("returned")
    order = sorted(kinds, key=lambda kind: draw(2**64, context, kind))
    for kind in order[:QUESTIONS_PER_CONTEXT]:
        choices = [question for question in answerable if question.kind == kind]
        # of kinds that the docstring could answer, so that the wording does not tell; one of three
        # makes a quarter of the rows: what is returned, where it is, always has an answer
        if not choices or draw(3, context, kind, "answer") == 0:
            choices = without_answer(kind, context, strangers) or choices
        question = choices[draw(len(choices), context, kind)]
        wordings = WORDINGS[question.kind]
        wording = wordings[draw(len(wordings), context, kind, question.name)]
        owner = of.source.partition(":")[2]
        text = wording.format(owner=owner, noun=question.noun, name=question.name)
        columns = {
            "id": hashlib.sha256(f"{context}\0{text}".encode()).hexdigest()[:24],
            "title": of.source,
            "context": context,
            "question": text,
            "answers": {
                "text": [context[start:end] for start, end in question.answers],
                "answer_start": [start for start, _ in question.answers],
            },
        }
        yield Row(of, f"{context}\n{text}", columns)


def draw(count: int, *parts: str) -> int:
    """A number below `count` that is the same for the same parts."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") % count


def digest_of_words(text: str) -> bytes:
    """SHA-256 of the words in small letters: equal for texts that differ in names and numbers."""
    return hashlib.sha256(" ".join(re.findall(r"\b[a-z_]+\b", text)).encode()).digest()


def printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # "\ud800" in a docstring is no character


def card(tasks: dict[str, list[Row]]) -> str:
    def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
        first, *rest = heads
        return "\n".join(
            [f"| {' | '.join([first, *rest])} |", f"|---{'|--:' * len(rest)}|"]
            + [f"| {' | '.join(row)} |" for row in rows]
        )

    by_split, by_domain = [], []
    for task, rows in tasks.items():
        counts = Counter(row.of.split for row in rows)
        by_split.append([task, *(f"{counts[split]:,}" for split in SPLITS)])
    for domain in DOCSTRING_DOMAINS:
        counts = [sum(row.of.domain == domain for row in rows) for rows in tasks.values()]
        by_domain.append([domain, *(f"{count:,}" for count in counts)])
    configs = "\n".join(
        f"- config_name: {task}\n  data_files:\n"
        + "\n".join(f"  - split: {split}\n    path: {task}/{split}.jsonl" for split in SPLITS)
        for task in tasks
    )
    tables = [table(["rows", *SPLITS], by_split), table(["rows of", *tasks], by_domain)]
    return CARD.format(configs=configs, table="\n\n".join(tables), versions=versions())


if __name__ == "__main__":
    command(main)
