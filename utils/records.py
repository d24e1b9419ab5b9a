"""Lines and rows of files: of a part of a file, from any position in it, each of bounded size."""

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet

from utils.files import BUFFER, open_file


class Shard(NamedTuple):
    """Part `part` of `parts` of a file: bytes of .jsonl, rows of .parquet, else every n-th line."""

    file: str
    part: int
    parts: int


def records(
    shard: Shard, fields: Sequence[str], position: int | None, limit: int
) -> Iterator[tuple[Any, int, int]]:
    """(a line or a row, its position, the position after it), of a shard from a position on.

    Of a record of more than `limit` bytes only their number: it is never whole in memory.

    Args:
        fields: what is read of the rows of a parquet file; with dots, inside of others.
    """
    with open_file(shard.file) as stream:
        if shard.file.endswith(".parquet"):
            yield from _parquet_rows(stream, shard, fields, position, limit)
        elif shard.file.endswith(".jsonl"):
            yield from _lines_by_byte(stream, shard, position, limit)
        else:
            yield from _lines_by_number(stream, shard, position, limit)


def _lines_by_byte(
    stream: io.BufferedIOBase, shard: Shard, position: int | None, limit: int
) -> Iterator[tuple[bytes | int, int, int]]:
    size = stream.seek(0, io.SEEK_END)
    start, stop = (size * part // shard.parts for part in (shard.part, shard.part + 1))
    if position is None:
        # a line belongs to the part in which its first byte stands
        position = start
        if start > 0:
            stream.seek(start - 1)
            position += skip_line(stream, stop - start + 1) - 1
    stream.seek(position)
    following = lines(stream, limit)
    while position < stop:
        if (line := next(following, None)) is None:
            raise OSError("it has become shorter while it was read")
        end = position + (line if isinstance(line, int) else len(line))
        if isinstance(line, int) or not line.isspace():
            yield line, position, end
        position = end


def _lines_by_number(
    stream: io.BufferedIOBase, shard: Shard, position: int | None, limit: int
) -> Iterator[tuple[bytes | int, int, int]]:
    for number, line in enumerate(lines(stream, limit)):
        mine = number % shard.parts == shard.part and number >= (position or 0)
        if mine and (isinstance(line, int) or not line.isspace()):
            yield line, number, number + 1


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


def skip_line(stream: io.BufferedIOBase, limit: float = math.inf) -> int:
    """Pass over the rest of a line, or some more than `limit` bytes of it; returns how many."""
    size = 0
    while size < limit and (piece := stream.readline(BUFFER)):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size
