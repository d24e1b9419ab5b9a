"""Where documents come from: files of a source, cut into shards, read from any position.

Formats: `.jsonl`, `.csv`, `.tsv` and `.txt`, also with `.gz` or `.zst`, and `.parquet`, on a local
disk, on the Hub (`org/name`, resolved by `datasets`) or at any URL that fsspec opens. Remote files
are read in ranges, never downloaded whole first.
"""

import csv
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow.parquet

from utils.config import InputError, Settings
from utils.files import READ_ERRORS, find_local_files, find_remote_files
from utils.program import announced, looked_for, warn
from utils.records import CSVS, TEXTS, SampleBy, Shard, describe_position, plain_text, records
from utils.tables import ABSENT, value_at

# .json.gz: JSON lines too, as C4 and Dolma name theirs
KINDS = ((".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".parquet"), CSVS, TEXTS)
FORMATS = sum(KINDS, ())
READABLE = ".jsonl, .csv, .tsv, .txt, all of them also with .gz or .zst, or .parquet"
BAD_RECORDS_SHOWN = 20  # by one process; the rest are only counted
HELD_OUT_CHECKED = 1000  # documents of a source that are read before the first step
MAX_DOCUMENT_BYTES = 2**28  # the longest documents of published corpora are of some 2**26


@dataclass
class Source:
    """One entry of the mixture."""

    path: str  # a file, folder, glob pattern or URL, or the name of a dataset on the Hub
    label: str | None = None  # in the logs; default: the path
    weight: float = 1.0  # share of the tokens, relative to the other sources
    epochs: int | None = None  # times each document is seen; null: as often as the run needs
    text_field: str = "text"  # content.text: a field of that name, or else text inside of content
    domain_field: str | None = None  # for example meta.redpajama_set_name or meta.pile_set_name
    # of .txt a document is the file, a block between blank lines, or a line, as `datasets` has it
    sample_by: SampleBy = "document"
    name: str | None = None  # of a dataset on the Hub: its configuration
    split: str = "train"  # of a dataset on the Hub
    revision: str | None = None  # of a dataset on the Hub: a commit makes the run repeatable

    @property
    def log_name(self) -> str:
        return self.label or self.path


@dataclass
class SourceArguments(Settings):
    """What becomes of records that are none, wherever sources are read."""

    on_bad_record: Literal["fail", "skip"] = "fail"  # broken records and files; skip also counts
    # of a line of JSON or a row of parquet; a longer one is a broken record, never whole in memory
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    def check(self) -> None:
        if self.max_document_bytes < 1:
            raise InputError(f"max_document_bytes must be 1 or more, not {self.max_document_bytes}")
        super().check()


DEFAULTS = SourceArguments()


class Document(NamedTuple):
    text: str
    domain: str
    position: int  # where it starts, a byte of .jsonl or a row: with `file` it names the document
    end: int  # where reading continues after it
    file: str
    size: int  # bytes of the text in UTF-8


class BadRecord(NamedTuple):
    """What stood where a document should be."""

    problem: str
    position: int
    end: int
    file: str

    def __str__(self) -> str:
        return f"{describe_position(self.file, self.position)}: {self.problem}"


class BadRecords:
    """Broken records and files: the first one stops, or each is named once and left out.

    Args:
        policy: "fail" or "skip".
        shown: of those left out, so many are named.
        one_rank: each process has records of its own.
    """

    def __init__(self, policy: str, shown: float = BAD_RECORDS_SHOWN, one_rank: bool = False):
        self.policy, self.shown, self.one_rank = policy, shown, one_rank
        self.messages: set[str] = set()

    def report(self, problem: BadRecord | OSError) -> None:
        if self.policy == "fail":
            hint = "--on_bad_record skip leaves such records out"
            raise InputError(f"{problem}; {hint}", self.one_rank)
        # to say where a record is takes reading the file up to it
        if len(self.messages) >= self.shown or (message := str(problem)) in self.messages:
            return
        self.messages.add(message)
        last = "; more are only counted" if len(self.messages) == self.shown else ""
        warn(f"skipped {message}{last}", self.one_rank)


def find_files(source: Source) -> list[str]:
    """The files of a source, sorted by name.

    Raises:
        InputError: nothing matches, or a format that cannot be read.
    """
    path, exists, is_of_the_hub = source.path, os.path.exists(source.path), False
    is_pattern = not exists and (path.endswith(FORMATS) or any(mark in path for mark in "*?["))
    if not exists and "://" in path:
        files = find_remote_files(path, KINDS)
    elif exists or is_pattern or path.count("/") != 1:
        files = find_local_files(path, KINDS)
    else:
        files, is_of_the_hub = _hub_files(source), True
    for name, nothing in {"split": "train", "name": None, "revision": None}.items():
        if not is_of_the_hub and getattr(source, name) != nothing:
            advice = "the name in the logs is label" if name == "name" else "leave it out"
            raise InputError(
                f"source {path!r}: {name} {getattr(source, name)!r} is for datasets of the Hub, "
                f"and these are files: {advice}"
            )
    if not files:
        raise InputError(f"source {path!r}: no file matches ({READABLE}){looked_for(path)}")
    for file in files:
        if not file.endswith(FORMATS) or os.path.isdir(file):
            raise InputError(f"source {path!r}: cannot read {file}: not {READABLE}")
    if source.sample_by != "document" and not any(file.endswith(TEXTS) for file in files):
        raise InputError(f"source {path!r}: sample_by is for .txt, and there is none: leave it out")
    return sorted(files)


def _hub_files(source: Source) -> list[str]:
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(source.path, name=source.name, revision=source.revision)
        splits = builder.config.data_files or {}
    except Exception as error:
        raise InputError(
            f"source {source.path!r}: no such file or folder here, and the Hub does not give it: "
            f"{type(error).__name__}: {error}{looked_for(source.path)}"
        ) from None
    if source.split not in splits:
        has = ", ".join(map(str, splits)) or "no files"
        hint = "; a stream cannot be cut into slices" if "[" in source.split else ""
        raise InputError(
            f"source {source.path!r} has no split {source.split!r} (it has: {has}){hint}"
        )
    return [str(file) for file in splits[source.split]]


def check_documents(
    sources: list[Source],
    arguments: SourceArguments = DEFAULTS,
    count: int = 1,
    most_domains: float = math.inf,
) -> list[list[str]]:
    """The files of each source, after a look at its first `count` documents.

    Raises:
        InputError: as `find_files`; a source without a document; a broken record that stops; more
            domains in its first documents.
    """
    found = []
    for source in sources:
        with announced(f"looking at the first documents of {source.path}", each_rank=True):
            found.append(files := find_files(source))
            has_domains = source.domain_field and most_domains < math.inf
            looked_at = max(count, HELD_OUT_CHECKED) if has_domains else count
            domains = _domains(source, files, arguments, looked_at)
        if has_domains and len(domains) > most_domains:
            raise too_many_domains(source, most_domains)
        if not domains:
            shown = ", ".join(files[:3])
            raise InputError(f"source {source.path!r} is empty: no document in {shown}")
    return found


def check_held_out(sources: list[Source], limit: int | None, arguments: SourceArguments) -> None:
    """`check_documents`, of the first documents that `held_out_documents` will give."""
    check_documents(sources, arguments, min(limit or HELD_OUT_CHECKED, HELD_OUT_CHECKED))


def too_many_domains(source: Source, most: float) -> InputError:
    return InputError(
        f"source {source.path!r}: domain_field {source.domain_field!r} has more than {most} "
        "values: name a field that sorts documents into a few kinds"
    )


def _domains(source: Source, files: list[str], arguments: SourceArguments, count: int) -> set[str]:
    """Of the first documents; of none, none."""
    broken_records, found = itertools.count(1), set()

    def report(problem: BadRecord | OSError) -> None:
        # so many are not a broken record here and there: the settings are wrong
        is_too_many = not found and isinstance(problem, BadRecord) and next(broken_records) == 1000
        if arguments.on_bad_record == "fail" or is_too_many:
            raise InputError(f"source {source.path!r}: {problem}")

    limit = arguments.max_document_bytes
    for document in itertools.islice(documents(source, files, report, limit), count):
        found.add(document.domain)
    return found


def read(
    shard: Shard,
    source: Source,
    position: int | None = None,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[Document | BadRecord]:
    """The documents (and `BadRecord`s) of a shard, in the file's order, from a position in it.

    Documents of nothing but white space are left out.

    Raises:
        OSError: the file cannot be read, or is damaged.
    """
    fields = (source.text_field, source.domain_field or "")
    try:
        limits = (position, max_document_bytes, source.sample_by)
        for record, start, end in records(shard, fields, *limits):
            position = end
            if isinstance(record, int):
                problem = f"{record:,} bytes: more than max_document_bytes {max_document_bytes:,}"
                if end == 1 and shard.file.endswith(TEXTS):
                    problem += "; sample_by: paragraph makes documents of its blocks"
                item = BadRecord(problem, start, end, shard.file)
            else:
                item = _document(record, start, end, shard, source)
            if isinstance(item, BadRecord) or item.text.strip():
                yield item
    except csv.Error as error:
        raise OSError(str(error)) from error
    except (*READ_ERRORS, UnicodeDecodeError, pyarrow.ArrowException) as error:
        units = {".parquet": "row", ".jsonl": "byte", ".txt": "byte"}
        unit = units.get(os.path.splitext(shard.file)[1], "line")
        unit = "row" if shard.file.endswith(CSVS) else unit
        after = "" if position is None else f", after {unit} {position}"
        raise OSError(f"{shard.file}{after}: {error}") from error


def documents(
    source: Source,
    files: list[str],
    report: Callable[[BadRecord | OSError], None],
    max_document_bytes: int,
) -> Iterator[Document]:
    """The documents of whole files, one after the other; what is broken there is reported."""
    for file in files:
        try:
            with closing(read(Shard(file, 0, 1), source, None, max_document_bytes)) as items:
                for item in items:
                    if isinstance(item, Document):
                        yield item
                    else:
                        report(item)
        except OSError as error:
            report(error)


def count_documents(
    source: Source, files: list[str], most: int, arguments: SourceArguments = DEFAULTS
) -> int:
    """As far as `most`; what is broken does not count."""
    found = documents(source, files, lambda problem: None, arguments.max_document_bytes)
    with closing(found):
        return sum(1 for _ in itertools.islice(found, most))


def held_out_documents(
    sources: list[Source], limit: int | None, arguments: SourceArguments = DEFAULTS
) -> Iterator[Document]:
    """The documents of the sources in the order of their files: of each source at most `limit`."""
    for source in sources:
        report = _held_out_records(source.path, arguments.on_bad_record).report
        found = documents(source, find_files(source), report, arguments.max_document_bytes)
        yield from itertools.islice(found, limit)


@functools.cache
def _held_out_records(path: str, on_bad_record: str) -> BadRecords:
    """Every evaluation meets them; they are named once."""
    return BadRecords(on_bad_record)


def _document(
    record: Any, position: int, end: int, shard: Shard, source: Source
) -> Document | BadRecord:
    def bad(problem: str) -> BadRecord:
        return BadRecord(problem, position, end, shard.file)

    if isinstance(record, str):
        return bad(record)
    is_text = shard.file.endswith(TEXTS)
    try:
        if isinstance(record, bytes):
            if is_text:
                record = plain_text(record, source.sample_by)
            else:
                record = json.loads(record.decode().lstrip("\ufeff"))  # a byte order mark
        elif not isinstance(record, dict):
            record = record.as_py()
    except (ValueError, OverflowError, RecursionError) as error:
        kind = "UTF-8 text" if is_text else "JSON"
        return bad(f"not {kind}: {error}" if isinstance(record, bytes) else f"{error}")
    text = record if is_text else value_at(record, source.text_field)
    if not isinstance(text, str):
        has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        wrong = "no field" if text is ABSENT else f"{type(text).__name__}, not text, in the field"
        wrong = "null in the field" if text is None else wrong
        return bad(f"{wrong} {source.text_field!r} (it has: {has})")
    domain = value_at(record, source.domain_field) if source.domain_field else None
    domain = source.log_name if domain in (None, ABSENT) else str(domain)
    field = source.text_field
    try:
        size = len(text.encode())
        field = source.domain_field
        domain.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair: JSON can spell it
        return bad(f"not Unicode in the field {field!r}: {error}")
    return Document(text, domain, position, end, shard.file, size)
