"""Lines, rows and texts of files: of a part of a file, from any position, each of bounded size; and
the sentences of a text."""

import csv
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow.parquet

from utils.config import InputError
from utils.files import BUFFER, open_file
from utils.program import announced

SampleBy = Literal["document", "paragraph", "line"]
COMPRESSED = ("", ".gz", ".zst")
TEXTS = tuple(f".txt{end}" for end in COMPRESSED)
CSVS = tuple(f".{kind}{end}" for kind in ("csv", "tsv") for end in COMPRESSED)
TSV = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}  # a cell that begins with a quote is text
MAX_CHARACTERS = 400
# not before a small letter, which goes on after an abbreviation
_END = re.compile(
    r"""[.!?…]["'”’)\]]*(?=\s+[^\sa-z])|[。！？]["”』」）]*|\n(?=[^\S\n]*\n)"""  # noqa: RUF001
)


class Shard(NamedTuple):
    """Part `part` of `parts` of a file: bytes of .jsonl and .txt, rows of .parquet, else every n-th
    line or row. A text that is a whole file is of the first part."""

    file: str
    part: int
    parts: int


def records(
    shard: Shard,
    fields: Sequence[str],
    position: int | None,
    limit: int,
    sample_by: SampleBy = "document",
) -> Iterator[tuple[Any, int, int]]:
    """(a line, row or text, its position, the position after it), of a shard from a position on.

    Of a record of more than `limit` bytes only their number: it is never whole in memory. Of a row
    of .csv that does not fit its header what is wrong with it.

    Args:
        fields: what is read of the rows of a parquet file; with dots, inside of others.
        sample_by: what of .txt is a text.
    """
    file, is_text = shard.file, shard.file.endswith(TEXTS)
    is_whole = is_text and sample_by == "document"
    if is_whole and (shard.part or position):
        return
    pieces = paragraphs if is_text and sample_by == "paragraph" else lines
    with open_file(file) as stream:
        if is_whole:
            yield _whole(stream, limit), 0, 1
        elif file.endswith(".parquet"):
            yield from _parquet_rows(stream, shard, fields, position, limit)
        elif file.endswith((".jsonl", ".txt")):
            yield from _by_byte(stream, shard, position, limit, pieces)
        elif file.endswith(CSVS):
            rows = (values for _, values in csv_rows(stream, file, limit))
            yield from _by_number(rows, shard, position)
        else:
            yield from _by_number(pieces(stream, limit), shard, position)


def describe_position(file: str, position: int) -> str:
    """`file, line n` (or row n) for people, from a position as records carry it."""
    if file.endswith(".parquet"):
        return f"{file}, row {position}"
    if file.endswith(CSVS):
        return f"{file}, row {position + 1}"
    if not file.endswith((".jsonl", ".txt")):
        return f"{file}, {'text' if file.endswith(TEXTS) else 'line'} {position + 1}"
    if not os.path.exists(file):
        return f"{file}, byte {position}"  # counting lines would download all before it
    with announced(f"counting the lines of {file}", each_rank=True), open(file, "rb") as stream:
        blocks = iter(lambda: stream.read(min(2**20, position - stream.tell())), b"")
        before = sum(block.count(b"\n") for block in blocks)
    return f"{file}, line {before + 1}"


def plain_text(text: bytes, sample_by: SampleBy) -> str:
    """As editors show it; raises UnicodeDecodeError."""
    text = text.decode().removeprefix("\ufeff").replace("\r\n", "\n")
    return text if sample_by == "document" else text.strip("\n")


def _whole(stream: io.BufferedIOBase, limit: int) -> bytes | int:
    blocks, size = [], 0
    for block in iter(lambda: stream.read(BUFFER), b""):
        size += len(block)
        if size <= limit:
            blocks.append(block)
    return b"".join(blocks) if size <= limit else size


def _by_byte(
    stream: io.BufferedIOBase, shard: Shard, position: int | None, limit: int, pieces: Callable
) -> Iterator[tuple[bytes | int, int, int]]:
    size = stream.seek(0, io.SEEK_END)
    start, stop = (size * part // shard.parts for part in (shard.part, shard.part + 1))
    if position is None:
        # a record belongs to the part in which its first byte stands
        position = start
        if start > 0:
            stream.seek(start - 1)
            position += skip_line(stream, stop - start + 1) - 1
        if 0 < position < stop and pieces is paragraphs:
            position = _next_paragraph(stream, position, stop)
    stream.seek(position)
    following = pieces(stream, limit)
    while position < stop:
        if (piece := next(following, None)) is None:
            raise OSError("it has become shorter while it was read")
        end = position + (piece if isinstance(piece, int) else len(piece))
        if isinstance(piece, int) or not piece.isspace():
            yield piece, position, end
        position = end


def _by_number(
    pieces: Iterator[Any], shard: Shard, position: int | None
) -> Iterator[tuple[Any, int, int]]:
    for number, piece in enumerate(pieces):
        mine = number % shard.parts == shard.part and number >= (position or 0)
        if mine and not (isinstance(piece, bytes) and piece.isspace()):
            yield piece, number, number + 1


def csv_rows(
    stream: io.BufferedIOBase, file: str, limit: int = 2**31 - 1
) -> Iterator[tuple[int, "dict[str, str] | str"]]:
    """(the line on which it ends, the row by column, or what is wrong with it), of .csv or .tsv.

    Raises:
        csv.Error: here begins no record.
        InputError: two columns have one name.
        UnicodeDecodeError: it is not UTF-8.
    """
    csv.field_size_limit(min(limit, 2**31 - 1))
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, **(TSV if ".tsv" in file[-8:] else {"strict": True}))
        line = 1
        try:
            check_columns(file, reader.fieldnames or ())
            line = reader.line_num + 1
            for values in reader:
                problem = "more" if None in values else "fewer" if None in values.values() else ""
                line = reader.line_num + 1
                found = f"{problem} values than the header has columns" if problem else values
                yield reader.line_num, found
        except csv.Error as error:
            raise csv.Error(f"{file}, line {line}: here begins no record: {error}") from None


def check_columns(file: str, names: Sequence[str]) -> None:
    for name in names:
        if name and names.count(name) > 1:  # a spreadsheet leaves columns without a name
            raise InputError(f"{file}: two columns are called {name!r}: name each of them once")


def _parquet_rows(
    stream: io.BufferedIOBase,
    shard: Shard,
    fields: Sequence[str],
    position: int | None,
    limit: int,
) -> Iterator[tuple[pyarrow.StructScalar | int, int, int]]:
    with pyarrow.parquet.ParquetFile(stream) as table:
        names = table.schema_arrow.names
        text, *more = (
            {name for name in names if f"{field}.".startswith(f"{name}.")} for field in fields
        )
        # without its first field a row is reported with the names of those that it has
        columns = [name for name in names if name in text.union(*more)] if text else names
        rows = table.metadata.num_rows
        start, stop = (rows * part // shard.parts for part in (shard.part, shard.part + 1))
        start = start if position is None else position
        row = 0
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if row + count <= start or row >= stop:
                row += count
                continue
            count = _rows_at_once(stream, table.metadata.row_group(group), columns)
            for batch in table.iter_batches(count, [group], columns, use_threads=False):
                if row >= stop:
                    break
                if row + batch.num_rows > start:
                    is_large = batch.nbytes > limit
                    for number, record in enumerate(batch.to_struct_array(), row):
                        if start <= number < stop:
                            size = batch.slice(number - row, 1).nbytes if is_large else 0
                            yield record if size <= limit else size, number, number + 1
                row += batch.num_rows


def _rows_at_once(stream: io.BufferedIOBase, group: Any, columns: list[str]) -> int:
    """As many as will not take a gigabyte, with all of them as long as they can be."""
    size = 1
    for index in range(group.num_columns):
        column = group.column(index)
        if any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in columns):
            size += column.total_uncompressed_size
            if column.has_dictionary_page:  # each row may be the longest text in it
                stream.seek(column.dictionary_page_offset)
                size += 64 * _page_bytes(stream.read(8))
    return min(64, max(1, 2**34 // size))


def _page_bytes(header: bytes) -> int:
    """The size of a parquet page: the second number in its header, of Thrift's compact protocol."""
    number, (_, _, numbers) = 0, header.partition(b"\x15\x04\x15")  # 4: a dictionary
    for place, byte in enumerate(numbers):
        number |= (byte & 127) << 7 * place
        if byte < 128:
            break
    return number >> 1


def lines(stream: io.BufferedIOBase, limit: int) -> Iterator[bytes | int]:
    """The lines that follow; of one of more than `limit` bytes only their number."""
    while line := stream.readline(limit + 1):
        if len(line) > limit:
            line = len(line) + (0 if line.endswith(b"\n") else skip_line(stream))
        yield line


def paragraphs(stream: io.BufferedIOBase, limit: int) -> Iterator[bytes | int]:
    """As `lines`, blocks of them: each begins where one that is not blank follows a blank one."""
    block, size, was_blank = [], 0, False
    for line in lines(stream, limit):
        is_blank = _is_blank(line)
        if was_blank and not is_blank:
            yield b"".join(block) if size <= limit else size
            block, size = [], 0
        size, was_blank = size + (line if isinstance(line, int) else len(line)), is_blank
        if size <= limit:
            block.append(line)
    if size:
        yield b"".join(block) if size <= limit else size


def _is_blank(line: bytes | int) -> bool:
    return not isinstance(line, int) and line.isspace()


def _next_paragraph(stream: io.BufferedIOBase, position: int, stop: int) -> int:
    """Where one begins, at this beginning of a line or after it; from `stop` on: not before."""
    was_blank, end = True, position - 1
    while was_blank and end > 0:  # back through the line before it
        begin = max(0, end - BUFFER)
        stream.seek(begin)
        *before, piece = stream.read(end - begin).split(b"\n")
        was_blank, end = not piece.strip(), 0 if before else begin
    stream.seek(position)
    for line in lines(stream, BUFFER):
        is_blank = _is_blank(line)
        if position >= stop or (was_blank and not is_blank):
            break
        position, was_blank = position + (line if isinstance(line, int) else len(line)), is_blank
    return position


def skip_line(stream: io.BufferedIOBase, limit: float = math.inf) -> int:
    """Pass over the rest of a line, or some more than `limit` bytes of it; returns how many."""
    size = 0
    while size < limit and (piece := stream.readline(BUFFER)):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


def cut_into_sentences(text: str) -> list[str]:
    """The sentences of a text; together they are the text. White space stands at their start.

    A sentence here is what BERT calls one: a stretch of text, cut where a sentence or a paragraph
    ends. Stretches of more than 400 characters (tables, code) are cut at a line's end or a blank.
    """
    sentences, start = [], 0
    for end in [*(match.end() for match in _END.finditer(text)), len(text)]:
        while end - start > MAX_CHARACTERS:
            limit = start + MAX_CHARACTERS
            line, blank = (text.rfind(mark, start + 1, limit) for mark in "\n ")
            cut = line if line > start else blank if blank > start else limit
            sentences.append(text[start:cut])
            start = cut
        sentences.append(text[start:end])
        start = end
    return sentences
