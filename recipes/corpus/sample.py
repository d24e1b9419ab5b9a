"""Build a corpus of real text without a download: from what is installed along with Python.

    python recipes/corpus/sample.py
    python recipes/corpus/sample.py --output_dir /somewhere/else

The sources of the standard library, Python's language reference, the docstrings of eight scientific
packages and the READMEs of those listed in installed_packages.py: a small Pile of several domains,
in SlimPajama's record format, one JSON object a line:

    {"text": "…", "meta": {"redpajama_set_name": "NumPy", "source": "numpy/linalg/_linalg.py:norm"}}

Packages are parsed, never imported. A document's text alone decides which split it belongs to and
where in it it stands, so that the same packages make the same files, byte for byte.
"""

import ast
import gc
import hashlib
import itertools
import json
import os
import signal
import sysconfig
import time
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path
from pydoc_data.topics import topics

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

from dataset_folder import replaced_folder
from installed_packages import (
    DOCSTRING_DOMAINS,
    PACKAGES,
    SKIPPED_FOLDERS,
    definitions,
    installed,
    versions,
)
from utils.config import InputError, command, parse

MINIMUM_CHARACTERS = 100
SPLITS = {
    "train": [f"train-{shard:05d}-of-00004.jsonl" for shard in range(4)],
    "validation": ["validation.jsonl"],
    "test": ["test.jsonl"],
}
Texts = Iterable[tuple[str, str]]  # each with its source
CARD = """\
---
language: en
task_categories:
- text-generation
configs:
- config_name: default
  data_files:
  - split: train
    path: train-*.jsonl
  - split: validation
    path: validation.jsonl
  - split: test
    path: test.jsonl
---
# Sample corpus

English prose and code from a Python installation, made by `recipes/corpus/sample.py`. One JSON
object a line: `text`, `meta.redpajama_set_name` (the domain) and `meta.source` (the file it was
read from, and the definition in it). No text occurs twice. Each text is under the license of the
package that it comes from.

{table}

Built from {versions}.
"""


@dataclass
class Arguments:
    """Build a corpus of real text from the Python installation."""

    output_dir: str = "data/sample"  # folder of the corpus; a corpus that stands there is replaced


@dataclass(frozen=True)
class Document:
    text: str
    domain: str
    source: str  # relative to the folder that the package is installed in
    digest: bytes  # SHA-256 of the text

    @property
    def split(self) -> str:
        permille = int.from_bytes(self.digest[:8], "big") % 1000
        return "test" if permille < 15 else "validation" if permille < 30 else "train"


def main() -> None:
    args = parse(Arguments)
    gc.disable()  # syntax trees have no cycles, and looking for some takes 40% of the time
    start = time.perf_counter()
    documents = build(installed_domains(), Path(args.output_dir))
    size = sum(len(document.text.encode()) for document in documents)
    print(
        f"{args.output_dir}: {len(documents):,} documents, {size / 1e6:.1f} MB "
        f"in {time.perf_counter() - start:.0f} s"
    )


def installed_domains() -> dict[str, Texts]:
    """Each domain with its texts, read from this Python and its packages as they are asked for.

    Raises:
        InputError: a package is not installed.
    """
    packages = {name: installed(name) for name in PACKAGES}
    domains: dict[str, Texts] = {
        "StandardLibrary": source_files(Path(sysconfig.get_path("stdlib"))),
        "Documentation": [
            *((topics[key], f"pydoc_data/topics.py:{key}") for key in sorted(topics)),
            *((readme(package), f"{name}/METADATA") for name, package in packages.items()),
        ],
    }
    for domain, name in DOCSTRING_DOMAINS.items():
        domains[domain] = docstrings(packages[name])
    return domains


def source_files(root: Path) -> Texts:
    """The Python files below a folder, whole."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - SKIPPED_FOLDERS
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(paths):
        if path.name.startswith("_sysconfigdata"):  # how and where this Python was compiled
            continue
        source = path.relative_to(root).as_posix()
        try:
            with tokenize.open(path) as file:  # in the encoding that the file declares
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            print(f"  skipped {source}: {error}", flush=True)
            continue
        yield text, source


def docstrings(package: Distribution) -> Texts:
    """The docstrings of a package's modules, classes and functions, dedented."""
    for definition in definitions(package):
        if text := ast.get_docstring(definition.node):
            yield text, definition.source


def readme(package: Distribution) -> str:
    return package.metadata["Description"] or ""


def build(domains: dict[str, Texts], output_dir: Path) -> list[Document]:
    """Write the corpus beside `output_dir` and move it there when it is whole.

    Raises:
        InputError: `output_dir` is a file, holds something else or cannot be written; a domain
            without text.
    """
    files = {"README.md", *itertools.chain(*SPLITS.values())}
    with replaced_folder(output_dir, files, "a sample corpus") as folder:
        documents = collect(domains)
        write(documents, folder)
    return documents


def collect(domains: dict[str, Texts]) -> list[Document]:
    """The documents of all domains, short and repeated ones dropped, in the order of their hash."""
    documents: dict[bytes, Document] = {}
    for domain, texts in domains.items():
        start = time.perf_counter()
        count = size = 0
        for text, source in texts:
            encoded = text.encode("utf-8", "replace")  # "\ud800" in a docstring is no character
            digest = hashlib.sha256(encoded).digest()
            if len(text) >= MINIMUM_CHARACTERS and digest not in documents:
                documents[digest] = Document(encoded.decode(), domain, source, digest)
                count += 1
                size += len(encoded)
        if not count:
            raise InputError(f"found no text for {domain}: install its packages with `make setup`")
        seconds = time.perf_counter() - start
        print(
            f"{domain:>16} {count:7,} documents {size / 1e6:6.1f} MB {seconds:6.1f} s", flush=True
        )
    return [documents[digest] for digest in sorted(documents)]


def write(documents: list[Document], folder: Path) -> None:
    for split, names in SPLITS.items():
        members = [document for document in documents if document.split == split]
        for shard, name in enumerate(names):
            with open(folder / name, "w", encoding="utf-8", newline="\n") as file:
                for document in members[shard :: len(names)]:
                    meta = {"redpajama_set_name": document.domain, "source": document.source}
                    record = {"text": document.text, "meta": meta}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    (folder / "README.md").write_text(card(documents), encoding="utf-8")


def card(documents: list[Document]) -> str:
    def row(title: str, members: list[Document]) -> str:
        cells = [title]
        for split in SPLITS:
            sizes = [len(document.text.encode()) for document in members if document.split == split]
            cells += [f"{len(sizes):,}", f"{sum(sizes):,}"]
        return f"| {' | '.join(cells)} |"

    domains = sorted({document.domain for document in documents})
    heads = ["domain", *(f"{split} {unit}" for split in SPLITS for unit in ("documents", "bytes"))]
    table = [
        f"| {' | '.join(heads)} |",
        f"|---{'|--:' * (len(heads) - 1)}|",
        *(
            row(name, [document for document in documents if document.domain == name])
            for name in domains
        ),
        row("**all**", documents),
    ]
    return CARD.format(table="\n".join(table), versions=versions())


if __name__ == "__main__":
    command(main)
