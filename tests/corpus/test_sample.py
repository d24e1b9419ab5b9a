"""recipes/corpus/sample.py: the parts on small trees, and the corpus of what is installed here."""

import hashlib
import json
import os
import random
import re
import sys
import sysconfig
from collections import Counter
from importlib.metadata import PathDistribution, version
from pathlib import Path

import pytest
from datasets import load_dataset

import programs
from programs import ROOT, documented_commands
from recipes.corpus import sample
from utils.config import InputError, parse

README = ROOT / "recipes/corpus/README.md"
BUILT = ROOT / "data/sample"
PROGRAM = "recipes/corpus/sample.py"
TRAIN = [f"train-0000{shard}-of-00004.jsonl" for shard in range(4)]
FILES = sorted([*TRAIN, "validation.jsonl", "test.jsonl", "README.md"])
DOMAINS = {
    *("StandardLibrary", "Documentation", "NumPy", "SciPy", "ScikitLearn", "Pandas", "PyTorch"),
    *("Transformers", "SymPy", "NetworkX"),
}


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# the corpus of this installation, as `make setup` has built it


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[dict]]:
    """File name → its records."""
    return {path.name: records(path) for path in BUILT.glob("*.jsonl")}


def test_the_program_leaves_nothing_else_and_tells_each_domain_and_the_totals(
    call, tmp_path, monkeypatch
):
    domains = {"One": texts(300, seed=1), "Two": texts(200, seed=2)}
    monkeypatch.setattr(sample, "installed_domains", lambda: domains)
    monkeypatch.setattr(sample.gc, "disable", lambda: None)  # it would stay so
    folder = tmp_path / "data" / "sample"
    done = call(sample.main, ["--output_dir", str(folder)], folder)
    assert (done.status, done.error) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert list(folder.parent.iterdir()) == [folder]
    *lines, last = done.output.splitlines()
    assert [line.split()[:2] for line in lines] == [["One", "300"], ["Two", "200"]]
    size = sum(len(record["text"].encode()) for record in read_corpus(folder))
    total = f"{folder}: 500 documents, {size / 1e6:.1f} MB in "
    assert re.fullmatch(re.escape(total) + r"\d+ s", last)


def test_setup_has_built_all_files_and_nothing_else(corpus):
    assert sorted(path.name for path in BUILT.iterdir()) == FILES


def test_records_have_the_format_of_slimpajama(corpus):
    for rows in corpus.values():
        for record in rows:
            assert list(record) == ["text", "meta"]
            assert list(record["meta"]) == ["redpajama_set_name", "source"]
            assert len(record["text"]) >= 100
            source = record["meta"]["source"]
            assert not source.startswith(("/", "..")), source
            assert sys.prefix not in source


def test_there_is_enough_text_in_every_domain_of_every_split(corpus):
    sizes = {name: sum(len(r["text"].encode()) for r in rows) for name, rows in corpus.items()}
    assert sum(sizes.values()) >= 25e6
    assert 200e3 < sizes["validation.jsonl"] < 1e6
    assert 200e3 < sizes["test.jsonl"] < 1e6
    for name in FILES[1:]:
        assert {r["meta"]["redpajama_set_name"] for r in corpus[name]} == DOMAINS, name
    shards = [sizes[name] for name in TRAIN]
    assert max(shards) < 1.2 * min(shards)


def test_no_text_occurs_twice(corpus):
    counts = Counter(record["text"] for rows in corpus.values() for record in rows)
    assert max(counts.values()) == 1


def test_the_hash_of_the_text_decides_on_split_and_order(corpus):
    for name, rows in corpus.items():
        digests = [hashlib.sha256(record["text"].encode()).digest() for record in rows]
        assert digests == sorted(digests)
        thousandths = [int.from_bytes(digest[:8], "big") % 1000 for digest in digests]
        low, high = {"test.jsonl": (0, 15), "validation.jsonl": (15, 30)}.get(name, (30, 1000))
        assert all(low <= thousandth < high for thousandth in thousandths)


def test_the_order_is_well_mixed(corpus):
    """Three hundred documents in a row are of every domain that has one in fifty."""
    frequent = DOMAINS - {"StandardLibrary", "Documentation"}
    for name in TRAIN:
        domains = [record["meta"]["redpajama_set_name"] for record in corpus[name]]
        for start in range(0, len(domains) - 300, 300):
            assert frequent <= set(domains[start : start + 300])


def test_known_documents_are_there(corpus):
    texts = {r["meta"]["source"]: r["text"] for rows in corpus.values() for r in rows}
    assert texts["numpy/linalg/_linalg.py:norm"].startswith("Matrix or vector norm.\n\n")
    assert "\nParameters\n----------\nx : array_like\n" in texts["numpy/linalg/_linalg.py:norm"]
    assert "pandas/core/frame.py:DataFrame.merge" in texts
    assert "PyTorch is a Python package" in texts["torch/METADATA"]
    assert texts["pydoc_data/topics.py:assert"].startswith('The "assert" statement')
    argparse = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")
    assert texts["argparse.py"] == argparse
    assert not [source for source in texts if re.search("(^|/)(tests?|site-packages)/", source)]


def test_the_card_counts_what_is_there(corpus):
    card = (BUILT / "README.md").read_text(encoding="utf-8")
    table = {}
    for line in card.splitlines():
        if re.match(r"\| [\w*]+ \| [\d,]+ \|", line):
            title, *cells = line.strip("| ").split(" | ")
            table[title] = [int(cell.replace(",", "")) for cell in cells]
    assert set(table) == DOMAINS | {"**all**"}
    for title, cells in table.items():
        expected = []
        for names in (TRAIN, ["validation.jsonl"], ["test.jsonl"]):
            texts = [
                record["text"]
                for name in names
                for record in corpus[name]
                if title in ("**all**", record["meta"]["redpajama_set_name"])
            ]
            expected += [len(texts), sum(len(text.encode()) for text in texts)]
        assert cells == expected, title
    assert f"numpy {version('numpy')}," in card
    assert f"Python {sys.version.split()[0]}," in card


def test_datasets_loads_the_folder_with_its_splits(corpus):
    splits = load_dataset(str(BUILT), streaming=True)
    assert list(splits) == ["train", "validation", "test"]
    assert next(iter(splits["train"])) == corpus[TRAIN[0]][0]
    assert list(splits["validation"]) == corpus["validation.jsonl"]
    assert list(splits["test"]) == corpus["test.jsonl"]


def test_the_packages_are_pinned_and_those_of_the_domains_among_them():
    requirements = (ROOT / "requirements.txt").read_text()
    assert set(sample.PACKAGES) <= set(re.findall(r"^([\w.-]+)==", requirements, re.MULTILINE))
    assert set(sample.DOCSTRING_DOMAINS.values()) <= set(sample.PACKAGES)
    assert list(sample.PACKAGES) == sorted(set(sample.PACKAGES))


TWO_DOMAINS = """
import sys
from pathlib import Path
sys.path.insert(0, "recipes/corpus")
import sample
domains = sample.installed_domains()
sample.build({name: domains[name] for name in ("Documentation", "NetworkX")}, Path(sys.argv[1]))
print([name for name in ("networkx", "numpy", "torch") if name in sys.modules])
"""


def test_two_builds_are_equal_byte_for_byte_and_import_no_package(tmp_path):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # ASCII
    for name, environment in (
        ("a", {"PYTHONHASHSEED": "0"}),
        ("b", {"PYTHONHASHSEED": "1"} | plain),
    ):
        done = programs.start("-c", TWO_DOMAINS, tmp_path / name, **environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("\n[]\n")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(records(tmp_path / "a" / TRAIN[0])) > 300


# where texts come from


def install(folder: Path, name: str, files: dict[str, bytes], readme: str = "") -> PathDistribution:
    """A package as pip leaves it: its files and a .dist-info folder beside them."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    header = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    (info / "METADATA").write_text(f"{header}\n{readme}", encoding="utf-8")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))
    write_files(folder, files)
    return PathDistribution(info)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


MODULE = b'''"""The module."""
raise ImportError("parsed, never imported")

class Outer(Base):
    """A class.

        indented

    with \\d, an escape that Python warns of.
    """
    x = """a string and no docstring"""

    @property
    def size(self) -> int:
        r"""A method: \\alpha."""
        def inner():
            """A function in a method."""

    class Inner:
        """A class in a class."""

if sys.platform == "linux":
    async def run():
        """A coroutine."""
else:
    try:
        def first():
            "In a try."
    except OSError:
        def second():
            "In an except."
    finally:
        for _ in ():
            def third():
                "In a loop."
match x:
    case 1:
        with y:
            def fourth():
                "In a match."

def silent():
    f"""No docstring: {x}."""

def empty():
    ""
'''


@pytest.mark.filterwarnings("error")
def test_docstrings(tmp_path, capsys):
    package = install(
        tmp_path,
        "toy",
        {
            "toy/b.py": MODULE,
            "toy/a.py": b"# -*- coding: latin-1 -*-\n'''na\xefve'''",
            "toy/utf8.py": b"\xef\xbb\xbf'''\xc3\xbcber'''",
            "toy/broken.py": b"def f(:",
            "toy/later.py": b"def f[T](): '''of Python 3.12'''",
            "toy/bytes.py": b"'''\xff'''",
            "toy/zero.py": b"'''a\0b'''",
            "toy/tests/test_a.py": b"'''A test.'''",
            "toy/data.txt": b"'''A text.'''",
        },
    )
    (tmp_path / "toy/not_in_record.py").write_text("'''Of somebody else.'''")
    assert list(sample.docstrings(package)) == [
        ("naïve", "toy/a.py"),
        ("The module.", "toy/b.py"),
        (
            "A class.\n\n    indented\n\nwith \\d, an escape that Python warns of.",
            "toy/b.py:Outer",
        ),
        ("A method: \\alpha.", "toy/b.py:Outer.size"),
        ("A class in a class.", "toy/b.py:Outer.Inner"),
        ("A coroutine.", "toy/b.py:run"),
        ("A function in a method.", "toy/b.py:Outer.size.inner"),
        ("In a try.", "toy/b.py:first"),
        ("In an except.", "toy/b.py:second"),
        ("In a loop.", "toy/b.py:third"),
        ("In a match.", "toy/b.py:fourth"),
        ("über", "toy/utf8.py"),
    ]
    skipped = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    names = ("broken", "bytes", "later", "zero")
    assert skipped == [f"  skipped toy/{name}.py" for name in names]


def test_source_files(tmp_path, capsys):
    write_files(
        tmp_path,
        {
            "z.py": b"x = 1\r\n",
            "a/latin.py": b"# coding: latin-1\n'na\xefve'\n",
            "a/__init__.py": b"",
            "a/bad.py": b"\n\n'\xff'\n",
            "a/data.txt": b"x",
            "a/test/test_a.py": b"x",
            "a/idle_test/b.py": b"x",
            "site-packages/numpy/a.py": b"x",
            "encodings/cp437.py": b"x",
            "pydoc_data/topics.py": b"x",
            "_sysconfigdata__linux_x86_64.py": b"x",
        },
    )
    assert list(sample.source_files(tmp_path)) == [
        ("", "a/__init__.py"),
        ("# coding: latin-1\n'naïve'\n", "a/latin.py"),
        ("x = 1\n", "z.py"),
    ]
    skipped = capsys.readouterr().out
    assert skipped.startswith("  skipped a/bad.py: 'utf-8' codec can't decode byte 0xff")


def test_readme(tmp_path):
    assert sample.readme(install(tmp_path, "toy", {}, "# Toy\n\nÜber.\n")) == "# Toy\n\nÜber.\n"
    assert sample.readme(install(tmp_path, "bare", {})) == ""


# what becomes of them


def texts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    return [("".join(draw.choices("abcd é☃\n", k=120)), f"f.py:{i}") for i in range(count)]


def read_corpus(folder: Path) -> list[dict]:
    return [record for path in sorted(folder.glob("*.jsonl")) for record in records(path)]


def test_the_order_in_which_documents_are_found_changes_nothing(tmp_path):
    one, two = texts(500, seed=1), texts(500, seed=2)
    sample.build({"One": one, "Two": two}, tmp_path / "a")
    sample.build({"Two": two[::-1], "One": one[::-1]}, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(read_corpus(tmp_path / "a")) == 1000


def test_a_document_more_moves_no_other_to_another_split(tmp_path):
    sample.build({"One": texts(400)}, tmp_path / "a")
    sample.build({"One": texts(500)}, tmp_path / "b")
    for name in ("validation.jsonl", "test.jsonl"):
        few, more = records(tmp_path / "a" / name), records(tmp_path / "b" / name)
        assert [r for r in more if int(r["meta"]["source"].partition(":")[2]) < 400] == few
        assert len(more) > 0


def test_short_and_repeated_texts_are_dropped(tmp_path):
    long, limit = "long " * 40, "x" * 100
    domains = {
        "One": [(long, "one.py"), (limit, "b"), (limit[1:], "c"), (long, "again.py"), ("", "d")],
        "Two": [(long, "two.py"), (long + "!", "e")],
    }
    sample.build(domains, tmp_path / "sample")
    found = {r["meta"]["source"]: r for r in read_corpus(tmp_path / "sample")}
    assert set(found) == {"one.py", "b", "e"}  # the first place where a text stands is kept
    meta = {"redpajama_set_name": "One", "source": "one.py"}
    assert found["one.py"] == {"text": long, "meta": meta}


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    sample.build({"One": [("a\ud800" * 60, "a"), ("☃\u2028" * 60, "b")]}, tmp_path / "sample")
    found = {r["meta"]["source"]: r["text"] for r in read_corpus(tmp_path / "sample")}
    assert found == {"a": "a?" * 60, "b": "☃\u2028" * 60}


def test_a_corpus_is_replaced_also_behind_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "sample").symlink_to("disk")
    for seed in (1, 2):
        sample.build({"One": texts(100, seed)}, tmp_path / "sample")
    assert (tmp_path / "sample").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "sample"]
    found = {record["text"] for record in read_corpus(tmp_path / "disk")}
    assert found == {text for text, _ in texts(100, seed=2)}


def test_an_interrupted_build_leaves_the_previous_corpus_and_nothing_else(tmp_path):
    folder = tmp_path / "sample"
    sample.build({"One": texts(100)}, folder)
    before = contents(folder)

    def interrupted():
        yield from texts(10, seed=3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample.build({"One": interrupted()}, folder)
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_what_a_killed_build_left_is_cleared_away(tmp_path):
    write_files(tmp_path, {".sample.partial/train-00000-of-00004.jsonl": b"half a li"})
    sample.build({"One": texts(100)}, tmp_path / "sample")
    assert list(tmp_path.iterdir()) == [tmp_path / "sample"]
    assert len(read_corpus(tmp_path / "sample")) == 100


# what is refused


def test_a_folder_with_other_content_is_not_replaced(tmp_path):
    for folder, name in (("notes", "README.md"), ("run", "model/config.json")):
        write_files(tmp_path, {f"{folder}/{name}": b"mine"})
        with pytest.raises(InputError) as error:
            sample.build({"One": texts(10)}, tmp_path / folder)
        assert str(error.value) == (
            f"{tmp_path / folder} holds something else than a sample corpus, which would be lost: "
            "remove it or give another folder with --output_dir"
        )
        assert (tmp_path / folder / name).read_bytes() == b"mine"
    sample.build({"One": texts(10)}, tmp_path / "corpus")
    (tmp_path / "corpus/tokenizer.json").write_text("mine")
    with pytest.raises(InputError):
        sample.build({"One": texts(10)}, tmp_path / "corpus")
    assert (tmp_path / "corpus/tokenizer.json").read_text() == "mine"


def test_two_builds_at_once(tmp_path):
    def texts_meanwhile():
        with pytest.raises(InputError, match=rf"^{tmp_path}/sample is in use by process"):
            sample.build({"One": texts(10)}, tmp_path / "sample")
        yield from texts(10)

    documents = sample.build({"One": texts_meanwhile()}, tmp_path / "sample")
    assert len(documents) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]
    assert sorted(path.name for path in (tmp_path / "sample").iterdir()) == FILES


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / "sample"
    with pytest.raises(InputError) as error:
        sample.build({"One": texts(10)}, folder)
    assert str(error.value) == f"cannot build {folder}: File exists: {tmp_path / 'file'}"
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_not_writable(tmp_path):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user writes anywhere")
    with pytest.raises(InputError) as error:
        sample.build({"One": texts(10)}, tmp_path / "sample")
    aside = tmp_path / ".sample.partial"
    assert str(error.value) == f"cannot build {tmp_path / 'sample'}: Permission denied: {aside}"


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device", "train-00000-of-00004.jsonl")

    monkeypatch.setattr(sample, "card", no_space)
    with pytest.raises(InputError) as error:
        sample.build({"One": texts(10)}, tmp_path / "sample")
    assert str(error.value) == (
        f"cannot build {tmp_path / 'sample'}: No space left on device: train-00000-of-00004.jsonl"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_domain_without_text(tmp_path):
    with pytest.raises(InputError) as error:
        sample.build({"One": texts(10), "Two": [("short", "a")]}, tmp_path / "sample")
    assert str(error.value) == "found no text for Two: install its packages with `make setup`"
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(sample, "PACKAGES", ("no-such-package", "numpy"))
    with pytest.raises(InputError) as error:
        sample.installed_domains()
    message = "the package no-such-package is not installed: run `make setup`"
    assert str(error.value) == message


def test_the_program_names_bad_input_in_one_line_and_ends_with_2(tmp_path):
    (tmp_path / "file").write_text("mine")
    done = programs.start(PROGRAM, "--output_dir", tmp_path / "file")
    message = f"error: {tmp_path / 'file'} is a file: give another folder with --output_dir\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert (tmp_path / "file").read_text() == "mine"


# the documents that people copy commands from


def test_documented_commands_are_valid():
    commands = documented_commands(PROGRAM, sample.__doc__, README.read_text())
    assert len(commands) >= 3
    for words in commands:
        assert parse(sample.Arguments, words).output_dir in ("data/sample", "/somewhere/else")
