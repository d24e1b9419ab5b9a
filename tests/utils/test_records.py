"""Documents of .txt and tables: every one once, from anywhere, in any number of parts."""

import csv
import gzip
import random
import re
from pathlib import Path

import pytest
import zstandard

from utils import records
from utils.config import InputError
from utils.lanes import choose_lanes, cut_into_shards
from utils.records import CSVS, TEXTS, Shard
from utils.sources import BadRecord, Source, check_documents, find_files, held_out_documents, read

PIECES = ("", "", " \t", "\r", "one", "two words\r", "  é 🙂", "x" * 40)


def write(path: Path, text: str) -> str:
    data = text.encode()
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return str(path)


def read_all(file: str, parts: int = 1, limit: int = 2**28, **settings) -> list:
    """Of all parts; reading goes on after each of their documents."""
    source, found = Source(file, **settings), []
    for part in range(parts):
        shard = Shard(file, part, parts)
        items = list(read(shard, source, None, limit))
        for index, item in enumerate(items):
            assert list(read(shard, source, item.end, limit)) == items[index + 1 :]
        found += items
    return sorted(found, key=lambda item: item.position)


def expected(text: str, sample_by: str) -> list[str]:
    """By regular expressions, of the whole text."""
    text = text.replace("\r\n", "\n")
    if sample_by == "document":
        found = [text]
    elif sample_by == "line":
        found = text.split("\n")
    else:
        found = re.split(r"\n(?:[^\S\n]*\n)+", f"\n\n{text}")
        found = [re.sub(r"(?:\n[^\S\n]*)+\Z", "", block) for block in found]
    return [block for block in found if block.strip()]


@pytest.mark.parametrize("sample_by", ["document", "paragraph", "line"])
@pytest.mark.parametrize("format", TEXTS)
def test_texts_are_cut_as_their_settings_say(format, sample_by, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "BUFFER", 16)  # blank lines longer than what is read at once
    draw = random.Random(format + sample_by)
    for case in range(60):
        lines = [draw.choice(PIECES) for _ in range(draw.randrange(30))]
        text = "\n".join(lines) + draw.choice(("", "\n", "\n" + " " * 40 + "\n\n"))
        file = write(tmp_path / f"{case}{format}", text)
        for parts in (1, 2, 5, 64):
            found = [item.text for item in read_all(file, parts, sample_by=sample_by)]
            clean = [re.sub(r"(?:\n[^\S\n]*)+\Z", "", t) for t in found]
            assert (clean if sample_by == "paragraph" else found) == expected(text, sample_by), text


def test_what_is_too_long_is_named_and_passed(tmp_path):
    text = "short\n\n" + "long " * 30 + "\nmore\n\nlast\n"
    file = write(tmp_path / "a.txt", text)
    for sample_by, kept in (("paragraph", ["short", "last"]), ("line", ["short", "more", "last"])):
        for parts in (1, 3):
            found = read_all(file, parts, 100, sample_by=sample_by)
            assert [item.text for item in found if not isinstance(item, BadRecord)] == kept
            (broken,) = (item for item in found if isinstance(item, BadRecord))
            assert str(broken).startswith(f"{file}, line 3: 15"), broken
    (whole,) = read_all(file, 1, 100)
    advice = "more than max_document_bytes 100; sample_by: paragraph makes documents of its blocks"
    assert str(whole) == f"{file}, line 1: {len(text)} bytes: {advice}"


def test_bytes_that_are_no_text_are_broken_records(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffine\n\nna\xefve\n\nfine too")
    first, broken, last = read_all(str(tmp_path / "a.txt"), sample_by="paragraph")
    assert (first.text, last.text) == ("fine", "fine too")
    assert str(broken).startswith(f"{tmp_path}/a.txt, line 3: not UTF-8 text: 'utf-8' codec can't")


@pytest.mark.parametrize("format", CSVS)
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_rows_of_tables(format, parts, tmp_path):
    texts = ["plain", "with, comma", "é 🙂", "", 'a "quote"', *(str(n) for n in range(20))]
    is_tsv = ".tsv" in format
    texts += [] if is_tsv else ["two\nlines", "a\r\n\r\nb"]
    file = tmp_path / f"a{format}"
    table = tmp_path / "plain"
    with table.open("w", newline="") as out:
        quoting = (
            {"quoting": csv.QUOTE_NONE, "quotechar": None, "delimiter": "\t"} if is_tsv else {}
        )
        csv.writer(out, **quoting).writerows([["id", "body"], *enumerate(texts)])
    write(file, table.read_bytes().decode())
    found = read_all(str(file), parts, text_field="body", domain_field="id")
    assert [item.text for item in found] == [text for text in texts if text]
    assert [item.domain for item in found] == [str(i) for i, text in enumerate(texts) if text]


def test_broken_rows_and_broken_tables(tmp_path):
    file = write(tmp_path / "a.csv", "text,n\none,1\ntwo\nthree,3,3\nfour,4\n")
    one, two, three, four = read_all(file)
    assert (one.text, four.text) == ("one", "four")
    assert str(two) == f"{file}, row 2: fewer values than the header has columns"
    assert str(three) == f"{file}, row 3: more values than the header has columns"
    file = write(tmp_path / "b.csv", 'text\none\n"two\nthree\n')
    with pytest.raises(OSError, match=r"b\.csv, line 3: here begins no record: unexpected end"):
        read_all(file)
    file = write(tmp_path / "c.csv", "body\none\n")
    with pytest.raises(InputError, match=r"c\.csv, row 1: no field 'text' \(it has: body\)"):
        check_documents([Source(file)])
    file = write(tmp_path / "d.csv", "text,text\none,1\n")
    with pytest.raises(InputError, match=r"d\.csv: two columns are called 'text'"):
        check_documents([Source(file)])


def test_a_folder_of_texts_and_one_of_data_with_notes(tmp_path, capsys):
    for name in ("b/two.txt", "one.txt", ".hidden.txt", "b/table.md"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "texts" / name, name)
    found = held_out_documents([Source(str(tmp_path / "texts"))], None)
    assert [document.text for document in found] == ["b/two.txt", "one.txt"]
    write(tmp_path / "texts" / "data.jsonl", '{"text": "data"}\n')
    (file,) = find_files(Source(str(tmp_path / "texts")))
    assert file.endswith("data.jsonl")
    said = capsys.readouterr().err
    assert "2 files of another kind than data.jsonl are left out, as two.txt: a pattern" in said
    assert len(find_files(Source(f"{tmp_path}/texts/**/*.txt"))) == 2


def test_settings_that_fit_no_file_are_refused(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "data"}\n')
    with pytest.raises(InputError, match=r"sample_by is for \.txt, and there is none: leave it"):
        find_files(Source(file, sample_by="line"))
    with pytest.raises(InputError, match=r"name 'x' is for .*, and these are files: .* is label$"):
        find_files(Source(file, name="x"))


@pytest.mark.parametrize(
    ("batch", "documents", "lanes"),
    [(64, 10**6, 64), (512, 256, 64), (48, 10**6, 48), (1000, 10**6, 50), (64, 40, 8), (64, 3, 1)],
)
def test_lanes_divide_the_batch_and_find_documents(batch, documents, lanes):
    assert choose_lanes(batch, documents) == lanes
    assert batch % lanes == 0


def test_whole_files_are_dealt_evenly():
    shards = cut_into_shards([f"{i}.txt" for i in range(40)], 8, is_whole=True)
    assert [shard.parts for shard in shards] == [1] * 40
    assert len(cut_into_shards(["a.txt"] * 5, 8, is_whole=True)) == 40  # each lane has its shards
