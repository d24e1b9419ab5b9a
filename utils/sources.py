"""Where documents come from: files of a source, cut into shards, read from any position.

Formats: `.jsonl`, `.jsonl.gz`, `.jsonl.zst` and `.parquet`, on a local disk, on the Hub
(`org/name`, resolved by `datasets`) or at any URL that fsspec opens. Remote files are read in
ranges, never downloaded whole first.
"""

import glob
import io
import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import fsspec
import pyarrow.parquet

from utils.config import InputError
from utils.files import READ_ERRORS, open_file

# .json.gz: JSON lines too, as C4 and Dolma name theirs
FORMATS = (".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".parquet")


@dataclass
class Source:
    """One entry of the mixture."""

    path: str  # a file, folder, glob pattern or URL, or the name of a dataset on the Hub
    name: str | None = None  # in the logs; default: the path
    weight: float = 1.0  # share of the tokens, relative to the other sources
    epochs: int | None = None  # times each document is seen; null: as often as the run needs
    text_field: str = "text"  # dots reach inside: content.text
    domain_field: str | None = None  # for example meta.redpajama_set_name or meta.pile_set_name
    split: str = "train"  # of a dataset on the Hub
    config_name: str | None = None  # of a dataset on the Hub
    revision: str | None = None  # of a dataset on the Hub: a commit makes the run repeatable


class Shard(NamedTuple):
    """Part `part` of `parts` of a file: bytes of .jsonl, rows of .parquet, else every n-th line."""

    file: str
    part: int
    parts: int


class Document(NamedTuple):
    text: str
    domain: str
    position: (
        int  # where it starts: a byte of .jsonl, else a row; with `file` it names the document
    )
    end: int  # where reading continues after it
    file: str
    size: int  # bytes of the text in UTF-8


class BadRecord(NamedTuple):
    """What stood where a document should be."""

    problem: str
    position: int
    end: int
    file: str

    @property
    def message(self) -> str:
        return f"{describe_position(self.file, self.position)}: {self.problem}"


def find_files(source: Source) -> list[str]:
    """The files of a source, sorted by name.

    Raises:
        InputError: nothing matches, or a format that cannot be read.
    """
    path = source.path
    if os.path.isdir(path):
        files = _readable(glob.glob(f"{glob.escape(path)}/**", recursive=True))
    elif os.path.exists(path):
        files = [path]
    elif "://" in path:
        files = _remote_files(path)
    elif any(mark in path for mark in "*?[") or path.endswith(FORMATS) or path.count("/") != 1:
        files = glob.glob(path, recursive=True)
    else:
        files = _hub_files(source)
    if not files:
        raise InputError(f"source {path!r}: no file matches (of {', '.join(FORMATS)})")
    for file in files:
        if not file.endswith(FORMATS) or os.path.isdir(file):
            raise InputError(f"source {path!r}: cannot read {file}: not {', '.join(FORMATS)}")
    return sorted(files)


def _readable(files: list[str]) -> list[str]:
    return [file for file in files if file.endswith(FORMATS) and not os.path.isdir(file)]


def _remote_files(url: str) -> list[str]:
    try:
        filesystem, pattern = fsspec.url_to_fs(url)
        if not url.endswith(FORMATS) and filesystem.isdir(pattern):
            found = _readable(filesystem.find(pattern))
        else:
            found = filesystem.glob(pattern)
    except Exception as error:  # every file system has kinds of its own
        raise InputError(f"source {url!r}: {type(error).__name__}: {error}") from None
    return [filesystem.unstrip_protocol(file) for file in found]


def _hub_files(source: Source) -> list[str]:
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(
            source.path, name=source.config_name, revision=source.revision
        )
        splits = builder.config.data_files or {}
    except Exception as error:
        raise InputError(
            f"source {source.path!r}: no such file or folder here, and the Hub does not give it: "
            f"{type(error).__name__}: {error}"
        ) from None
    if source.split not in splits:
        has = ", ".join(map(str, splits)) or "no files"
        raise InputError(f"source {source.path!r} has no split {source.split!r} (it has: {has})")
    return [str(file) for file in splits[source.split]]


def find_checked_files(sources: list[Source], skip_bad_records: bool) -> list[list[str]]:
    """The files of each source of a mixture.

    Raises:
        InputError: weights, epochs or names that make no mixture; a source without a document.
    """
    if not sources:
        raise InputError("no sources: give at least one path")
    weights = [source.weight for source in sources]
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        shown = ", ".join(f"{source.path}: {source.weight:g}" for source in sources)
        raise InputError(f"the weights of the sources must be positive ({shown})")
    names = [source.name or source.path for source in sources]
    for source, name in zip(sources, names, strict=True):
        if names.count(name) > 1:
            raise InputError(f"two sources are called {name!r}: give each its own name")
        if source.epochs is not None and source.epochs < 1:
            raise InputError(f"source {name!r}: epochs must be at least 1, not {source.epochs}")
    found = [find_files(source) for source in sources]
    for source, files in zip(sources, found, strict=True):
        _find_first_document(source, files, skip_bad_records)
    return found


def _find_first_document(source: Source, files: list[str], skip_bad_records: bool) -> None:
    bad_records = 0
    for file in files:
        try:
            with closing(read(Shard(file, 0, 1), source)) as items:
                for item in items:
                    if isinstance(item, Document):
                        return
                    bad_records += 1
                    # so many are not a broken record here and there: the settings are wrong
                    if not skip_bad_records or bad_records == 1000:
                        raise InputError(f"source {source.path!r}: {item.message}")
        except OSError as error:
            if not skip_bad_records:
                raise InputError(f"source {source.path!r}: {error}") from None
    raise InputError(f"source {source.path!r} is empty: no document in {', '.join(files[:3])}")


def cut_into_shards(files: list[str], lanes: int) -> list[Shard]:
    """Every document of the files in exactly one shard, and as many shards to every lane.

    A source of many files (16 a lane or more) is not cut: a file is a shard. Otherwise every file
    is cut into the same number of parts, the fewest that deal out evenly. Each part of a
    compressed file costs decompressing all of it: there, many files, or a multiple of the lanes,
    are the fastest.
    """
    parts = 1 if len(files) >= 16 * lanes else lanes // math.gcd(len(files), lanes)
    return [Shard(file, part, parts) for file in files for part in range(parts)]


def read(
    shard: Shard, source: Source, position: int | None = None
) -> Iterator[Document | BadRecord]:
    """The documents (and `BadRecord`s) of a shard, in the file's order, from a position in it.

    Documents of nothing but white space are left out.

    Raises:
        OSError: the file cannot be read, or is damaged.
    """
    try:
        for record, start, end in _records(shard, source, position):
            position = end
            item = _document(record, start, end, shard, source)
            if isinstance(item, BadRecord) or item.text.strip():
                yield item
    except (*READ_ERRORS, pyarrow.ArrowException) as error:
        unit = {".parquet": "row", ".jsonl": "byte"}.get(os.path.splitext(shard.file)[1], "line")
        after = "" if position is None else f", after {unit} {position}"
        raise OSError(f"{shard.file}{after}: {error}") from error


def held_out_documents(
    sources: list[Source], limit: int | None, on_bad_record: str = "fail"
) -> Iterator[Document]:
    """The documents of the sources in the order of their files: of each source at most `limit`."""
    for source in sources:
        shards = (Shard(file, 0, 1) for file in find_files(source))
        items = itertools.chain.from_iterable(read(shard, source) for shard in shards)
        count = 0
        for item in items:
            if isinstance(item, BadRecord):
                if on_bad_record == "fail":
                    raise InputError(item.message)
            elif item.text.strip():
                yield item
                count += 1
                if count == limit:
                    break


def check_held_out(sources: list[Source]) -> None:
    """Raises InputError unless every source begins with a document."""
    for source in sources:
        if next(held_out_documents([source], 1), None) is None:
            raise InputError(f"source {source.path!r} is empty: no document to evaluate on")


def describe_position(file: str, position: int) -> str:
    """`file, line n` (or row n) for people, from a position as documents carry it."""
    if file.endswith(".parquet"):
        return f"{file}, row {position}"
    if not file.endswith(".jsonl"):
        return f"{file}, line {position + 1}"
    if not os.path.exists(file):
        return f"{file}, byte {position}"  # counting lines would download all before it
    with open(file, "rb") as stream:
        blocks = iter(lambda: stream.read(min(2**20, position - stream.tell())), b"")
        lines = sum(block.count(b"\n") for block in blocks)
    return f"{file}, line {lines + 1}"


def _records(shard: Shard, source: Source, position: int | None) -> Iterator[tuple[Any, int, int]]:
    """(a line's bytes or a pyarrow scalar, its position, the position after it)."""
    with open_file(shard.file) as stream:
        if shard.file.endswith(".parquet"):
            yield from _parquet_rows(stream, shard, source, position)
        elif shard.file.endswith(".jsonl"):
            yield from _lines_by_byte(stream, shard, position)
        else:
            yield from _lines_by_number(stream, shard, position)


def _lines_by_byte(
    stream: io.BufferedIOBase, shard: Shard, position: int | None
) -> Iterator[tuple[bytes, int, int]]:
    size = stream.seek(0, io.SEEK_END)
    start, stop = (size * part // shard.parts for part in (shard.part, shard.part + 1))
    if position is None:
        # a line belongs to the part in which its first byte stands
        position = start
        if start > 0:
            stream.seek(start - 1)
            position += len(stream.readline()) - 1
    stream.seek(position)
    while position < stop and (line := stream.readline()):
        if not line.isspace():
            yield line, position, position + len(line)
        position += len(line)


def _lines_by_number(
    stream: io.BufferedIOBase, shard: Shard, position: int | None
) -> Iterator[tuple[bytes, int, int]]:
    for number, line in enumerate(stream):
        mine = number % shard.parts == shard.part
        if mine and number >= (position or 0) and not line.isspace():
            yield line, number, number + 1


def _parquet_rows(
    stream: io.BufferedIOBase, shard: Shard, source: Source, position: int | None
) -> Iterator[tuple[pyarrow.StructScalar, int, int]]:
    with pyarrow.parquet.ParquetFile(stream) as table:
        text, _, _ = source.text_field.partition(".")
        domain, _, _ = (source.domain_field or "").partition(".")
        names = table.schema_arrow.names
        # without its text field a row is reported with the names of the fields that it has
        columns = [name for name in names if name in (text, domain)] if text in names else names
        rows = table.metadata.num_rows
        start, stop = (rows * part // shard.parts for part in (shard.part, shard.part + 1))
        start = start if position is None else position
        row = 0
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if row + count <= start or row >= stop:
                row += count
                continue
            for batch in table.iter_batches(64, [group], columns, use_threads=False):
                if row >= stop:
                    break
                if row + batch.num_rows > start:
                    for number, record in enumerate(batch.to_struct_array(), row):
                        if start <= number < stop:
                            yield record, number, number + 1
                row += batch.num_rows


def _document(
    record: Any, position: int, end: int, shard: Shard, source: Source
) -> Document | BadRecord:
    def bad(problem: str) -> BadRecord:
        return BadRecord(problem, position, end, shard.file)

    try:
        if isinstance(record, bytes):
            record = json.loads(record.decode().lstrip("\ufeff"))  # a byte order mark
        else:
            record = record.as_py()
    except (ValueError, RecursionError) as error:
        return bad(f"not JSON: {error}" if isinstance(record, bytes) else f"{error}")
    text = _field(record, source.text_field)
    if not isinstance(text, str):
        has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        wrong = "no field" if text is None else f"{type(text).__name__}, not text, in the field"
        return bad(f"{wrong} {source.text_field!r} (it has: {has})")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:  # half a surrogate pair: JSON can spell it
        return bad(f"not Unicode in the field {source.text_field!r}: {error}")
    domain = _field(record, source.domain_field) if source.domain_field else None
    name = source.name or source.path
    return Document(text, name if domain is None else str(domain), position, end, shard.file, size)


def _field(record: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record
