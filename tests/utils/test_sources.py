import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.implementations.local import LocalFileSystem

from utils import files
from utils.config import InputError
from utils.lanes import check_mixture, cut_into_shards
from utils.sources import (
    KINDS,
    READABLE,
    BadRecord,
    Document,
    Shard,
    Source,
    SourceArguments,
    check_documents,
    check_held_out,
    describe_position,
    find_files,
    read,
)

FORMATS = KINDS[0]  # what holds fields in fields
RECORDS = [{"text": f"number {i} é 🙂\n", "meta": {"set": "AB"[i % 2]}} for i in range(23)]


def to_bytes(format: str, records: list, newline: str = "\n") -> bytes:
    """A file of a format: several row groups, gzip members, zstd frames."""
    if format == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records), sink, row_group_size=7)
        return sink.getvalue()
    lines = [json.dumps(record).encode() + newline.encode() for record in records]
    pieces = [b"".join(lines[i : i + 10]) for i in range(0, len(lines), 10)]
    if format.endswith(".gz"):
        pieces = [gzip.compress(piece) for piece in pieces]
    elif format.endswith(".zst"):
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        pieces = [compressor.compress(piece) for piece in pieces]
    return b"".join(pieces)


def random_records(count: int) -> list[dict]:
    """Records that hardly compress."""
    draw = random.Random(0)
    return [{"text": draw.randbytes(300).hex(), "meta": {"set": "A"}} for _ in range(count)]


def write(path: Path, records: list, newline: str = "\n") -> str:
    format = next(f for f in sorted(FORMATS, key=len, reverse=True) if path.name.endswith(f))
    path.write_bytes(to_bytes(format, records, newline))
    return str(path)


def read_all(file: str, parts: int = 1, **settings) -> list[Document | BadRecord]:
    source = Source(file, **settings)
    return [item for part in range(parts) for item in read(Shard(file, part, parts), source)]


def texts(items: list) -> list[str]:
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items]


@pytest.fixture(params=FORMATS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return write(tmp_path / f"data{request.param}", RECORDS)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds slept between attempts."""
    waits: list[float] = []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    return waits


# every document once, from anywhere


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 23, 64, 500])
def test_parts_of_a_file_hold_every_document_once(file: str, parts: int):
    assert sorted(texts(read_all(file, parts))) == sorted(r["text"] for r in RECORDS)


def test_a_document_knows_its_domain_its_place_and_its_size(file: str):
    first, second = read_all(file, domain_field="meta.set", label="numbers")[:2]
    assert (first.text, first.domain, first.position, first.file) == (
        RECORDS[0]["text"],
        "A",
        0,
        file,
    )
    assert (second.domain, second.position) == ("B", first.end)
    assert first.size == len(RECORDS[0]["text"].encode()) == 17
    assert read_all(file, domain_field="meta.other", label="numbers")[0].domain == "numbers"
    assert read_all(file)[0].domain == file


@pytest.mark.parametrize("format", FORMATS)
def test_fields_inside_fields(tmp_path, format):
    records = [{"content": {"body": {"text": f"t{i}"}, "kind": {"id": i}}} for i in range(20)]
    file = write(tmp_path / f"data{format}", records)
    items = read_all(file, text_field="content.body.text", domain_field="content.kind.id")
    assert texts(items) == [f"t{i}" for i in range(20)]
    assert [item.domain for item in items] == [str(i) for i in range(20)]
    (broken, *_) = read_all(file, text_field="content.body.title")
    assert broken.problem == "no field 'content.body.title' (it has: content)"


@pytest.mark.parametrize("parts", [1, 3])
def test_reading_continues_after_any_document(file: str, parts: int):
    source = Source(file)
    for part in range(parts):
        shard = Shard(file, part, parts)
        items = list(read(shard, source))
        for index, item in enumerate(items):
            assert list(read(shard, source, item.end)) == items[index + 1 :]


@pytest.mark.parametrize("format", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("parts", [1, 4, 30])
def test_blank_lines_carriage_returns_and_a_last_line_without_end(tmp_path, format, parts):
    file = write(tmp_path / f"data{format}", RECORDS, newline="\r\n\r\n  \n")
    assert sorted(texts(read_all(file, parts))) == sorted(r["text"] for r in RECORDS)
    plain = b'\n{"text": "one"}\r\n{"text": "two"}'
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[format]
    Path(file).write_bytes(pack(plain))
    assert sorted(texts(read_all(file, parts))) == ["one", "two"]


def test_byte_order_marks_of_files_written_on_windows(tmp_path):
    mark = b"\xef\xbb\xbf"
    path = tmp_path / "data.jsonl"
    path.write_bytes(mark + b'{"text": "one"}\r\n' + mark + b'{"text": "two"}\r\n')
    assert texts(read_all(str(path))) == ["one", "two"]


@pytest.mark.parametrize("format", FORMATS)
def test_documents_of_white_space_are_left_out(tmp_path, format):
    records = [{"text": t} for t in ["a", "", " \n\t", "\u3000", "b"]]
    assert texts(read_all(write(tmp_path / f"data{format}", records), 2)) == ["a", "b"]


def test_empty_files_hold_nothing(tmp_path):
    for format in (".jsonl", ".jsonl.gz", ".jsonl.zst"):
        (tmp_path / f"data{format}").write_bytes(b"")
        assert read_all(str(tmp_path / f"data{format}"), 3) == []
    for format in (".jsonl.gz", ".jsonl.zst"):
        assert read_all(write(tmp_path / f"data{format}", []), 3) == []
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "data.parquet")
    assert read_all(str(tmp_path / "data.parquet"), 3) == []


def test_lines_longer_than_any_buffer_and_parts_inside_one_line(tmp_path):
    records = [{"text": "x" * 700_000}, {"text": "short"}, {"text": "y" * 700_000}]
    for format in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"):
        file = write(tmp_path / f"data{format}", records)
        assert sorted(map(len, texts(read_all(file, 16)))) == [5, 700_000, 700_000]


def test_a_zstd_window_of_two_gigabytes(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(b'{"text": "far"}\n') + compressor.flush()
    (tmp_path / "data.jsonl.zst").write_bytes(data)
    assert texts(read_all(str(tmp_path / "data.jsonl.zst"))) == ["far"]


def sized(path: Path, sizes: list[int]) -> str:
    """A file with lines or values of so many bytes; those of 500 and more do not end it."""
    format = next(f for f in sorted(FORMATS, key=len, reverse=True) if path.name.endswith(f))
    if format == ".parquet":
        pq.write_table(pa.table({"text": ["x" * (size - 4) for size in sizes]}), path)
    else:
        text = b"".join(b'{"text": "' + b"x" * (size - 13) + b'"}\n' for size in sizes)
        text = text.removesuffix(b"\n")
        pack = {"z": gzip.compress, "t": zstandard.compress}.get(format[-1], bytes)
        path.write_bytes(zstandard.compress(text) if format.endswith(".zst") else pack(text))
    return str(path)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 64])
def test_a_record_longer_than_the_bound_is_named_and_passed(file, parts):
    sizes = [80, 100, 101, 50, 900_000, 900_000, 60, 100, 3000]
    file = sized(Path(file), sizes)
    source, items = Source(file), []
    for part in range(parts):
        shard = Shard(file, part, parts)
        found = list(read(shard, source, None, 100))
        items += found
        for index, item in enumerate(found):  # reading goes on after any of them
            assert list(read(shard, source, item.end, 100)) == found[index + 1 :]
    items.sort(key=lambda item: item.position)
    is_long = [isinstance(item, BadRecord) for item in items]
    assert is_long == [size > 100 for size in sizes]
    unit = "row" if file.endswith(".parquet") else "line"
    first = unit == "line"
    for number, (item, size) in enumerate(zip(items, sizes, strict=True), first):
        if size > 100:
            size -= first and number == len(sizes)  # the last line has no end
            problem = f"{size:,} bytes: more than max_document_bytes 100"
            assert str(item) == f"{file}, {unit} {number}: {problem}"


MEASURE = """
import resource, sys
from utils.sources import Shard, Source, read
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = list(read(Shard(sys.argv[1], 0, 1), Source(sys.argv[1]), None, 2**20))
print([type(item).__name__ for item in found])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("format", [".jsonl.gz", ".jsonl.zst"])
def test_little_that_becomes_much_takes_little_memory(tmp_path, format):
    path = tmp_path / f"data{format}"
    line = b'{"text": "' + b"a" * 600_000_000
    if format.endswith(".gz"):
        data = gzip.compress(line + b'"}\n{"text": "after"}\n', 1)
    else:
        data = zstandard.compress(line + b'"}\n{"text": "after"}\n')
    path.write_bytes(data)
    command = [sys.executable, "-c", MEASURE, str(path)]
    types, megabytes = subprocess.check_output(command, text=True).splitlines()
    assert types == "['BadRecord', 'Document']"
    assert int(megabytes) < 200


def test_rows_of_parquet_that_are_large_come_one_by_one(tmp_path, monkeypatch):
    """Also those of a dictionary, in which a long text stands once."""
    counts = []
    original = pq.ParquetFile.iter_batches

    def iter_batches(self, size, *arguments, **settings):
        counts.append(size)
        return original(self, size, *arguments, **settings)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    path = tmp_path / "data.parquet"
    texts = ["x" * 30_000_000] * 9
    for settings in ({"use_dictionary": False}, {"dictionary_pagesize_limit": 2**30}):
        pq.write_table(pa.table({"text": texts}), path, **settings)
        found = list(read(Shard(str(path), 0, 1), Source(str(path))))
        assert [item.size for item in found] == [30_000_000] * 9
    assert counts == [63, 8]


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(tmp_path):
    path = Path(write(tmp_path / "data.jsonl", random_records(9000)))
    items = read(Shard(str(path), 0, 1), Source(str(path)))
    next(items)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)
    with pytest.raises(OSError, match=r"after byte \d+: it has become shorter while it was read"):
        list(items)


def test_parquet_reads_only_the_row_groups_and_columns_it_needs(tmp_path, monkeypatch):
    calls = []
    original = pq.ParquetFile.iter_batches

    def iter_batches(self, size, groups, columns, **settings):
        calls.append((groups, columns))
        return original(self, size, groups, columns, **settings)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    records = [{"id": i, "text": f"t{i}", "meta": {"set": "A", "more": 1}} for i in range(23)]
    file = write(tmp_path / "data.parquet", records)  # row groups of 7
    source = Source(file, domain_field="meta.set")
    assert texts(list(read(Shard(file, 0, 1), source, 15))) == [f"t{i}" for i in range(15, 23)]
    assert calls == [([2], ["text", "meta"]), ([3], ["text", "meta"])]
    calls.clear()
    assert texts(list(read(Shard(file, 1, 3), source))) == [f"t{i}" for i in range(7, 15)]
    assert calls == [([1], ["text", "meta"]), ([2], ["text", "meta"])]


def test_a_compressed_part_decodes_only_its_own_lines(tmp_path, monkeypatch):
    decoded = []
    loads = json.loads
    monkeypatch.setattr(
        "utils.sources.json.loads", lambda line: decoded.append(line) or loads(line)
    )
    file = write(tmp_path / "data.jsonl.zst", RECORDS)
    assert len(list(read(Shard(file, 2, 8), Source(file), 10))) == len(decoded) == 2  # 10 and 18


# what is broken


@pytest.mark.parametrize("format", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut', "not JSON: Invalid control character at: line 1 column 14 (char 13)"),
        (b"\xff\xfe\xfa", "not JSON: 'utf-8' codec can't decode byte 0xff in position 0"),
        (b'{"text": "\xff"}', "not JSON: 'utf-8' codec can't decode byte 0xff in position 10"),
        (b"[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        (b'["text"]', "no field 'text' (it has: list)"),
        (b"null", "no field 'text' (it has: NoneType)"),
        (b'{"content": "a", "id": 3}', "no field 'text' (it has: content, id)"),
        (b'{"text": null}', "null in the field 'text' (it has: text)"),
        (b'{"text": ["a"]}', "list, not text, in the field 'text' (it has: text)"),
        (b'{"text": "\\ud83d"}', "not Unicode in the field 'text': 'utf-8' codec can't encode"),
    ],
)
def test_a_broken_line_is_reported_and_passed(tmp_path, format, line, problem):
    lines = [b'{"text": "a"}', b"", line, b'{"text": "b"}']
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[format]
    path = tmp_path / f"data{format}"
    path.write_bytes(pack(b"\n".join(lines)))
    first, broken, last = read_all(str(path))
    assert (first.text, last.text) == ("a", "b")
    assert isinstance(broken, BadRecord)
    assert str(broken).startswith(f"{path}, line 3: {problem}")
    assert list(read(Shard(str(path), 0, 1), Source(str(path)), broken.end)) == [last]


def test_broken_rows_of_parquet(tmp_path):
    file = write(tmp_path / "null.parquet", [{"text": "a"}, {"text": None}, {"text": "b"}])
    first, broken, last = read_all(file)
    assert (first.text, last.text) == ("a", "b")
    assert str(broken) == f"{file}, row 1: null in the field 'text' (it has: text)"

    file = write(tmp_path / "missing.parquet", [{"id": 1, "content": "a"}])
    assert str(read_all(file)[0]) == f"{file}, row 0: no field 'text' (it has: id, content)"
    assert texts(read_all(file, text_field="content", domain_field="meta.set")) == ["a"]

    buffers = [pa.py_buffer(data) for data in (b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0", b"a\xffb")]
    column = pa.StringArray.from_buffers(3, *buffers)
    pq.write_table(pa.table({"text": column}), tmp_path / "bytes.parquet")
    first, broken, last = read_all(str(tmp_path / "bytes.parquet"))
    assert (first.text, last.text) == ("a", "b")
    assert "row 1: 'utf-8' codec can't decode byte 0xff" in str(broken)


@pytest.mark.parametrize("format", [".jsonl.gz", ".jsonl.zst"])
def test_a_file_that_is_cut_short_is_an_error_after_what_it_holds(tmp_path, format, waits):
    path = Path(write(tmp_path / f"data{format}", random_records(99)))
    data = path.read_bytes()
    for size in (len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        found = []
        with pytest.raises(OSError, match=re.escape(str(path))) as error:
            found.extend(read(Shard(str(path), 0, 1), Source(str(path))))
        assert " end" in str(error.value)  # "ended before the end-of-stream", "ends in the middle"
    assert waits == []  # reading it again would not help


@pytest.mark.parametrize("format", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_damaged_file_is_an_error_that_says_where(tmp_path, format, waits):
    records = random_records(2000)
    path = Path(write(tmp_path / f"data{format}", records))
    data = bytearray(path.read_bytes())
    start = len(data) // 2
    if format == ".parquet":  # it has no checksums: only what is not data is found to be wrong
        start = pq.ParquetFile(path).metadata.row_group(100).column(0).dictionary_page_offset
    data[start : start + 300] = b"\xff" * 300
    path.write_bytes(data)
    found = []
    with pytest.raises(OSError, match=rf"^{path}, after (line|row) [0-9]+: ") as error:
        found.extend(read(Shard(str(path), 0, 1), Source(str(path))))
    assert texts(found[:600]) == [r["text"] for r in records[:600]]
    unit = "row" if format == ".parquet" else "line"
    assert f"after {unit} {found[-1].end}: " in str(error.value)
    path.write_bytes(b"garbage" * 100)
    with pytest.raises(OSError, match=f"^{path}: "):
        read_all(str(path))
    assert waits == []


def test_a_file_that_is_not_there_or_not_allowed_is_not_waited_for(tmp_path, waits, monkeypatch):
    with pytest.raises(OSError, match=r"gone\.jsonl: No such file or directory$"):
        read_all(str(tmp_path / "gone.jsonl"))

    def refuse(self, path, mode="rb", block_size=None, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(LocalFileSystem, "_open", refuse)
    with pytest.raises(OSError, match=r"there\.jsonl: Permission denied$"):
        read_all(write(tmp_path / "there.jsonl", RECORDS))
    assert waits == []


# reads that fail


class RemoteFile(fsspec.spec.AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.fetch(self.path, start, end)


class RemoteFileSystem(fsspec.AbstractFileSystem):
    """Files that are read in ranges, as from the Hub; counts bytes, and fails when told to."""

    protocol = "remote"
    cachable = False
    content: ClassVar[dict[str, bytes]] = {}
    fetched = attempts = failures_in_a_row = 0

    def ls(self, path, detail=True, **settings):
        files = [
            {"name": name, "size": len(data), "type": "file"}
            for name, data in self.content.items()
            if f"{name}/".startswith(f"{path}/")
        ]
        return files if detail else [file["name"] for file in files]

    def _open(self, path, mode="rb", block_size=None, **settings):
        return RemoteFile(self, path, mode, block_size)

    def fetch(self, path: str, start: int, end: int) -> bytes:
        remote = type(self)
        remote.attempts += 1
        if remote.attempts % (1 + remote.failures_in_a_row):
            raise [TimeoutError("too slow"), RuntimeError("reset")][remote.attempts % 2]
        remote.fetched += end - start
        return self.content[path][start:end]


@pytest.fixture
def remote(monkeypatch) -> type[RemoteFileSystem]:
    fsspec.register_implementation("remote", RemoteFileSystem, clobber=True)
    for name in ("fetched", "attempts", "failures_in_a_row"):
        monkeypatch.setattr(RemoteFileSystem, name, 0)
    return RemoteFileSystem


@pytest.mark.parametrize("format", FORMATS)
def test_reads_that_fail_twice_go_on_where_they_stopped(format, remote, waits, capsys, monkeypatch):
    monkeypatch.setattr(files, "BUFFER", 4096)
    monkeypatch.setattr(files, "REMOTE_BLOCK", 4096)
    records = random_records(2000)
    remote.content[f"store/data{format}"] = to_bytes(format, records)
    remote.failures_in_a_row = 2
    url = f"remote://store/data{format}"
    items = read_all(url, 3, domain_field="meta.set")
    assert sorted(texts(items)) == sorted(r["text"] for r in records)
    assert waits == [1, 2] * (len(waits) // 2)
    assert len(waits) >= 10
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len(waits)
    assert warnings[:2] == [
        f"warning: {url}: RuntimeError: reset; again in 1 s",
        f"warning: {url}: TimeoutError: too slow; again in 2 s",
    ]


def test_reads_that_fail_for_good_give_up(remote, waits):
    remote.content["store/data.jsonl"] = to_bytes(".jsonl", RECORDS)
    remote.failures_in_a_row = 1_000_000
    with pytest.raises(OSError, match=r"^remote://store/data\.jsonl: .*\(6 attempts\)$"):
        read_all("remote://store/data.jsonl")
    assert waits == [1, 2, 4, 8, 16]


def test_a_remote_file_is_read_in_ranges(remote):
    lines = [b'{"text": "%05d %s"}\n' % (i, b"x" * 980) for i in range(30_000)]
    remote.content["store/big.jsonl"] = b"".join(lines)
    url = "remote://store/big.jsonl"
    assert find_files(Source(url)) == [url]
    items = read(Shard(url, 2, 3), Source(url))
    assert [next(items).text[:5] for _ in range(3)] == ["20000", "20001", "20002"]
    items.close()
    assert remote.fetched < 5_000_000  # of 30


# names


def test_files_folders_globs_and_urls(tmp_path, monkeypatch):
    folder = tmp_path / "a [1]"
    (folder / "deep").mkdir(parents=True)
    names = ["b.jsonl", "a.jsonl.gz", "deep/c.parquet", "deep/d.jsonl.zst", "deep/e.json.gz"]
    paths = sorted(write(folder / name, RECORDS) for name in names)
    (folder / "README.md").write_text("not data")
    (folder / "folder.jsonl").mkdir()
    assert find_files(Source(str(folder))) == paths
    assert find_files(Source(paths[0])) == paths[:1]
    assert find_files(Source(f"{tmp_path}/*/deep/*")) == [p for p in paths if "/deep/" in p]
    monkeypatch.chdir(folder)
    assert find_files(Source("*.jsonl.gz")) == ["a.jsonl.gz"]
    assert find_files(Source("deep")) == ["deep/c.parquet", "deep/d.jsonl.zst", "deep/e.json.gz"]

    memory = fsspec.filesystem("memory")
    for name in ("x/1.jsonl", "x/y/2.jsonl", "x/y/notes.txt"):
        memory.pipe(f"/names/{name}", to_bytes(".jsonl", RECORDS))
    urls = ["memory:///names/x/1.jsonl", "memory:///names/x/y/2.jsonl"]
    assert find_files(Source("memory://names/x")) == urls
    assert find_files(Source("memory://names/x/*.jsonl")) == urls[:1]
    assert texts(read_all(urls[1])) == [r["text"] for r in RECORDS]
    url = (folder / "b.jsonl").as_uri().replace("%20", " ").replace("%5B", "[").replace("%5D", "]")
    assert texts(read_all(url)) == [r["text"] for r in RECORDS]


def test_a_file_comes_once_however_many_links_lead_to_it(tmp_path, capsys):
    folder = tmp_path / "data"
    (folder / "v1" / "deep").mkdir(parents=True)
    paths = sorted(write(folder / "v1" / name, RECORDS) for name in ("b.jsonl", "deep/c.jsonl"))
    outside = write(tmp_path / "outside.jsonl", RECORDS)
    (folder / "latest").symlink_to("v1")
    (folder / "a.jsonl").symlink_to("v1/b.jsonl")
    for name in ("loop", "again"):  # by both of them, for ever
        (folder / name).symlink_to(".")
        (folder / "v1" / "deep" / name).symlink_to("..")
    assert find_files(Source(str(folder))) == paths
    assert capsys.readouterr().err == (
        f"warning: {folder}: 3 more names (links) of the same files are left out\n"
    )
    assert find_files(Source(f"{folder}/**/*.jsonl")) == paths
    assert find_files(Source(f"{folder}/**/deep/*.jsonl")) == paths[1:]
    assert find_files(Source(f"{folder}/*/*.jsonl")) == paths[:1]
    # what a link alone leads to counts as well, and two names of one file on the disk are one file
    (folder / "z.jsonl").symlink_to(outside)
    os.link(paths[0], folder / "v1" / "hard.jsonl")
    assert find_files(Source(str(folder))) == [*paths, str(folder / "z.jsonl")]
    # a folder that is a link is read by its name
    assert find_files(Source(str(folder / "latest"))) == [
        str(folder / "latest" / name) for name in ("b.jsonl", "deep/c.jsonl")
    ]


def test_a_folder_that_may_not_be_read_is_left_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "lost+found").mkdir()
    path = write(tmp_path / "a.jsonl", RECORDS)
    listdir = os.listdir

    def refuse(folder):
        if str(folder).endswith("lost+found"):
            raise PermissionError(13, "Permission denied")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    assert find_files(Source(str(tmp_path))) == [path]
    assert capsys.readouterr().err == (
        f"warning: left out {tmp_path / 'lost+found'}: Permission denied\n"
    )


def test_local_names_that_look_like_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a::b.jsonl", "zip::c.jsonl.gz", "d[1].jsonl", "e*.parquet"):
        assert find_files(Source(write(Path(name), RECORDS))) == [name]
        assert texts(read_all(name)) == [r["text"] for r in RECORDS]
        assert texts(read_all(str(tmp_path / name))) == [r["text"] for r in RECORDS]
    with pytest.raises(InputError, match=r"files inside of another are not read: unpack a\.zip$"):
        find_files(Source("zip://*.jsonl::a.zip"))


@pytest.mark.parametrize(
    "given",
    [{"split": "train[:90%]"}, {"split": "test"}, {"revision": "main"}, {"name": "x"}],
)
def test_settings_of_the_hub_beside_files_are_refused(tmp_path, given):
    (name,), path = given, write(tmp_path / "a.jsonl", RECORDS)
    with pytest.raises(InputError, match=rf"a\.jsonl': {name} '.*' is for datasets of the Hub"):
        find_files(Source(path, **given))
    with pytest.raises(InputError, match="is for datasets of the Hub"):
        find_files(Source(f"file://{path}", **given))


@pytest.mark.parametrize("format", FORMATS)
def test_names_with_dots_are_fields_or_lead_into_fields(tmp_path, format):
    records = [
        {"doc.text": "literal", "a": {"b.c": "inner", "d": None}, "meta.set": "web"},
        {"doc.text": "again", "a": {"b.c": "more", "d": None}, "meta.set": "books"},
    ]
    path = write(tmp_path / f"data{format}", records)
    found = read_all(path, text_field="doc.text", domain_field="meta.set")
    assert [(d.text, d.domain) for d in found] == [("literal", "web"), ("again", "books")]
    assert texts(read_all(path, text_field="a.b.c")) == ["inner", "more"]
    assert "null in the field 'a.d'" in str(read_all(path, text_field="a.d")[0])
    assert "no field 'doc.body'" in str(read_all(path, text_field="doc.body")[0])


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    formats = READABLE
    (tmp_path / "notes.md").write_text("not data")
    (tmp_path / "folder.jsonl").mkdir()
    for path in ("gone.jsonl", "*.jsonl.zst", "memory://gone/data.jsonl", "no-such-name"):
        with pytest.raises(InputError) as error:
            find_files(Source(path))
        told, _, folder = str(error.value).partition("; looked for from ")
        assert told == f"source {path!r}: no file matches ({formats})"
        assert folder == ("" if "://" in path else str(Path.cwd()))
    with pytest.raises(InputError, match="no file matches"):
        find_files(Source(str(tmp_path)))
    for name in ("notes.md", "*"):
        with pytest.raises(InputError, match=f"cannot read .*: not {formats}"):
            find_files(Source(f"{tmp_path}/{name}"))


def test_urls_that_cannot_be_listed(remote, monkeypatch):
    def refuse(self, path, **settings):
        raise RuntimeError("refused")

    monkeypatch.setattr(remote, "ls", refuse)
    for url, reason in (
        ("remote://store/data-*.jsonl", "RuntimeError: refused"),
        ("nosuch://store/data.jsonl", "ValueError: Protocol not known: nosuch"),
    ):
        with pytest.raises(InputError) as error:
            find_files(Source(url))
        assert str(error.value) == f"source {url!r}: {reason}"


def test_a_name_on_the_hub_goes_through_datasets(monkeypatch):
    asked = []
    url = "hf://datasets/org/name@0123456789abcdef0123456789abcdef01234567/data/train-0.jsonl.zst"

    def load_dataset_builder(path, name=None, revision=None):
        asked.append((path, name, revision))
        data_files = {datasets.Split.TRAIN: [url], datasets.Split.TEST: ["hf://other.jsonl"]}
        return SimpleNamespace(config=SimpleNamespace(data_files=data_files))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    assert find_files(Source("org/name", name="en", revision="v1")) == [url]
    assert asked == [("org/name", "en", "v1")]
    with pytest.raises(InputError) as error:
        find_files(Source("org/name", split="validation"))
    assert str(error.value) == "source 'org/name' has no split 'validation' (it has: train, test)"
    filesystem, path = fsspec.url_to_fs(url)
    assert type(filesystem).__name__ == "HfFileSystem"
    assert path == url.removeprefix("hf://")

    # what the Hub would send, from memory
    opened = []

    def open_from_memory(self, path, mode="rb", **settings):
        opened.append(path)
        return io.BytesIO(to_bytes(".jsonl.zst", RECORDS))

    monkeypatch.setattr(type(filesystem), "open", open_from_memory)
    assert texts(read_all(url)) == [r["text"] for r in RECORDS]
    assert opened == [path]


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    def load_dataset_builder(path, **settings):
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    with pytest.raises(InputError) as error:
        find_files(Source("data/sampel"))
    assert str(error.value) == (
        "source 'data/sampel': no such file or folder here, and the Hub does not give it: "
        "ConnectionError: Couldn't reach 'data/sampel' on the Hub; "
        f"looked for from {os.getcwd()}"
    )


# sources as settings


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no sources: give at least one path"),
        ([Source("a", weight=0)], "the weights of the sources must be positive (a: 0)"),
        (
            [Source("a", weight=2), Source("b", weight=-1)],
            "the weights of the sources must be positive (a: 2, b: -1)",
        ),
        (
            [Source("a", weight=float("nan"))],
            "the weights of the sources must be positive (a: nan)",
        ),
        ([Source("a", epochs=0)], "source 'a': epochs must be at least 1, not 0"),
        (
            [Source("a"), Source("b", label="a")],
            "two sources are called 'a': give each its own name",
        ),
    ],
)
def test_sources_that_make_no_mixture(sources, message):
    with pytest.raises(InputError) as error:
        check_mixture(sources)
    assert str(error.value) == message


def test_a_source_must_hold_a_document(tmp_path, waits):
    empty = write(tmp_path / "a.jsonl", [{"text": " "}])
    source = Source(str(tmp_path))

    def check(message: str, on_bad_record: str) -> None:
        with pytest.raises(InputError) as error:
            check_documents([source], SourceArguments(on_bad_record))
        assert str(error.value) == f"source {str(tmp_path)!r}{message}"

    check(f" is empty: no document in {empty}", "fail")
    good = write(tmp_path / "c.jsonl", [{"content": "x"}, {"text": "found"}])
    check(f": {good}, line 1: no field 'text' (it has: content)", "fail")
    assert check_documents([source], SourceArguments("skip")) == [[empty, good]]
    damaged = write(tmp_path / "b.jsonl.gz", RECORDS)
    Path(damaged).write_bytes(b"garbage")
    check(f": {damaged}: Not a gzipped file (b'ga')", "fail")
    assert check_documents([source], SourceArguments("skip")) == [[empty, damaged, good]]
    # of held-out data more than the first document is looked at, so far as it will be read
    late = write(tmp_path / "z.jsonl", [{"text": "x"}, {"text": None}])
    source.path = late
    for limit, is_met in ((None, True), (2, True), (1, False)):
        with pytest.raises(InputError, match="line 2: null in") if is_met else nullcontext():
            check_held_out([source], limit, SourceArguments("fail"))
        check_held_out([source], limit, SourceArguments("skip"))
    Path(late).unlink()
    source.path = str(tmp_path)
    # the field is misnamed, not a record broken here and there
    source.text_field = "body"
    wrong = write(tmp_path / "d.jsonl", [{"content": "x"}] * 5000)
    check(f": {wrong}, line 997: no field 'body' (it has: content)", "skip")


def test_positions_for_people(tmp_path):
    file = write(tmp_path / "data.jsonl", RECORDS)
    for line, item in enumerate(read_all(file), 1):
        assert describe_position(file, item.position) == f"{file}, line {line}"
    assert describe_position("s3://bucket/data.jsonl", 77) == "s3://bucket/data.jsonl, byte 77"
    assert describe_position("data.jsonl.gz", 6) == "data.jsonl.gz, line 7"
    assert describe_position("data.parquet", 6) == "data.parquet, row 6"


@pytest.mark.parametrize("lanes", [1, 2, 6, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 64, 95, 96, 1024, 1030])
def test_shards_are_dealt_out_evenly(lanes: int, count: int):
    names = [str(i) for i in range(count)]
    shards = cut_into_shards(names, lanes)
    assert {(s.file, s.part) for s in shards} == {
        (name, part) for name in names for part in range(shards[0].parts)
    }
    by_lane = [len(shards[lane::lanes]) for lane in range(lanes)]
    if count < 16 * lanes:
        assert len(set(by_lane)) == 1
    else:
        assert shards == [Shard(name, 0, 1) for name in names]
        assert max(by_lane) - min(by_lane) <= 1
