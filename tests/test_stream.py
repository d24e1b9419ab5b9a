import functools
import io
import json
import os
import random
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from conftest import make_documents, write_jsonl

from utils import packing, sources, stream
from utils.config import InputError
from utils.packing import DocumentEncoder, packed_rows
from utils.sources import Document, Source
from utils.stream import Corpus, Lane, Row, StepStream, StreamArguments, keyed_permutation

FORMATS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]


def write(folder: Path, format: str, records: list[dict]) -> None:
    """One file of a format, in several gzip members, zstd frames or row groups."""
    import gzip

    file = folder / f"data{format}"
    if format == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), file, row_group_size=9)
        return
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[format]
    file.write_bytes(b"".join(pack(b"".join(lines[i : i + 9])) for i in range(0, len(lines), 9)))


def words(texts: list[str]) -> list[list[str]]:
    """An encoder for lanes alone: its tokens are words."""
    return [text.split() for text in texts]


def make_lane(sources: list[Source], index: int = 0, state: dict | None = None, **settings) -> Lane:
    arguments = StreamArguments(**{"lanes": 1, "shuffle_documents": 8, **settings})
    return Lane(Corpus(sources, words, arguments, seed=0), index, state)


def drain(lane: Lane, limit: int = 10_000) -> list[Document]:
    documents = []
    while len(documents) < limit and (item := lane.next()):
        documents.append(item[1])
    return documents


@pytest.fixture(params=FORMATS)
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> list[Source]:
    """Two sources of a format, one of which leaves after two epochs."""
    for name, count in (("small", 15), ("big", 50)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, request.param, make_documents(name, count))
    domain = "meta.redpajama_set_name"
    return [
        Source(str(tmp_path / "small"), "small", weight=2, epochs=2, domain_field=domain),
        Source(str(tmp_path / "big"), "big", weight=1, domain_field=domain),
    ]


class Run:
    """The rows of every step, over all ranks."""

    def __init__(self, sources: list[Source], tokenizer, lanes: int = 8, **settings):
        self.encode, self.sources = DocumentEncoder(tokenizer), sources
        self.settings = {"lanes": lanes, "shuffle_documents": 8, **settings}

    def rank(self, rank: int, world_size: int, states: dict | None = None, seed: int = 0):
        corpus = Corpus(self.sources, self.encode, StreamArguments(**self.settings), seed)
        rows_of = partial(packed_rows, corpus, 48)
        return StepStream(corpus, rows_of, 2, rank, world_size, states).steps()

    def steps(self, count: int, world_size: int = 1, states=None, seed: int = 0) -> list[list[Row]]:
        ranks = [self.rank(rank, world_size, states, seed) for rank in range(world_size)]
        steps = [[next(rank) for rank in ranks] for _ in range(count)]
        return [sorted(sum(step, []), key=lambda row: row.lane) for step in steps]


def plain(step: list[Row]) -> list:
    """A step as values that compare equal only when every bit of it is equal."""
    return [
        (row.lane, row.tokens, row.state, {k: (v.dtype, v.tobytes()) for k, v in row.features.items()})
        for row in step
    ]


def states_after(steps: list[list[Row]]) -> dict[int, dict]:
    states = {row.lane: row.state for step in steps for row in step}
    return {int(lane): state for lane, state in json.loads(json.dumps(states)).items()}


# P1: the global batch is a function of the settings, the seed and the step


def test_world_sizes_and_workers_do_not_change_a_batch(mixture, tokenizer, monkeypatch):
    expected = list(map(plain, Run(mixture, tokenizer).steps(20)))
    assert len({str(step) for step in expected}) == 20
    # workers that are forked: those that are spawned, as runs have them, take seconds to start
    loader = functools.partialmethod(
        torch.utils.data.DataLoader.__init__, multiprocessing_context="fork"
    )
    for world_size in (1, 2, 4, 8):
        assert list(map(plain, Run(mixture, tokenizer).steps(20, world_size))) == expected
    monkeypatch.setattr(stream, "WORKER_START", "fork")
    for world_size in (1, 2, 4):
        run = Run(mixture, tokenizer, dataloader_num_workers=2)
        assert list(map(plain, run.steps(20, world_size))) == expected
    del loader
