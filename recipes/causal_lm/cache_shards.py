"""The files of a teacher's cache: rows in their order, written whole or not at all."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from utils.config import InputError
from utils.files import written_aside
from utils.stream import Row

SHARD_ROWS, GROUP_ROWS = 256, 8
FEATURES = ("input_ids", "shift_labels", "position_ids")


def write_shard(path: Path, rows: list[Row], tops: list[tuple[np.ndarray, np.ndarray]]) -> int:
    """Bytes of the file, which is there whole or not at all."""
    columns: dict[str, Any] = {
        name: _lists([row.features[name] for row in rows]) for name in FEATURES
    }
    columns["lengths"] = pa.array([int(row.features["lengths"]) for row in rows], pa.int32())
    columns["tokens"] = pa.array([row.tokens for row in rows], pa.int32())
    columns["seen"] = pa.array([json.dumps(row.state["seen"]) for row in rows])
    columns["state"] = pa.array([json.dumps(row.state) for row in rows])
    columns["top_ids"] = _lists([ids.astype(np.uint32).ravel() for ids, _ in tops])
    columns["top_log_probabilities"] = _lists([kept.ravel() for _, kept in tops])
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        pq.write_table(
            pa.table(columns),
            aside,
            row_group_size=GROUP_ROWS,
            compression="zstd",
            write_page_checksum=True,
        )
        size = os.path.getsize(aside)
    return size


def read_shard(path: Path, start: int) -> Iterator[dict[str, Any]]:
    """Its rows from this one on, by columns."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        number = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if number + size > start:
                try:
                    table = file.read_row_group(group)
                except (OSError, pa.ArrowException):
                    raise _damaged(path, one_rank=True) from None
                names = table.column_names
                columns = {name: _values(table[name].combine_chunks()) for name in names}
                for row in range(max(0, start - number), size):
                    yield {name: column[row] for name, column in columns.items()}
            number += size


def read_row(path: Path, number: int) -> dict[str, Any]:
    """What was kept of the teacher for one of its rows, by columns."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if number < size:
                    table = file.read_row_group(group, ["top_ids", "top_log_probabilities"])
                    names = table.column_names
                    return {name: _values(table[name].chunk(0))[number] for name in names}
                number -= size
    except (OSError, pa.ArrowException):
        pass
    raise _damaged(path, one_rank=True)


def state_after(path: Path) -> dict[str, Any]:
    """Of the lane, after the last row of a shard."""
    with pq.ParquetFile(path) as file:
        last = file.read_row_group(file.num_row_groups - 1, ["state"])["state"][-1].as_py()
    return json.loads(last)


def _values(column: pa.Array) -> list[Any]:
    """Of a column, row by row; lists as arrays."""
    if not isinstance(column, pa.ListArray):
        return column.to_pylist()
    offsets = column.offsets.to_pylist()
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[start:end] for start, end in itertools.pairwise(offsets)]


def _lists(arrays: list[np.ndarray]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


def shard(folder: Path, lane: int, first: int) -> Path:
    return folder / f"lane-{lane:05}" / f"rows-{first:09}.parquet"


def shards(folder: Path, lane: int) -> list[tuple[int, int]]:
    """(number of its first row, rows) of a lane's shards, as far as they follow each other."""
    found, number = [], 0
    while (path := shard(folder, lane, number)).exists():
        found.append((number, count := count_rows(path)))
        number += count
    return found


def count_rows(path: Path) -> int:
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException):
        raise _damaged(path) from None


def _damaged(path: Path, one_rank: bool = False) -> InputError:
    return InputError(
        f"teacher_cache: {path} is cut short or damaged: remove it and write it again with "
        "--write_teacher_cache",
        one_rank,
    )
