import gzip
import json
import math
import multiprocessing
import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from conftest import corpus_of, make_documents, write_jsonl
from packing import DocumentEncoder, packed_rows
from recipes.causal_lm.pretrain import Arguments
from utils import lanes, sources
from utils.config import InputError
from utils.lanes import Corpus, Lane, Lanes
from utils.loss import IGNORE_INDEX
from utils.randomness import keyed_permutation
from utils.run_folder import DATA_ONCE, differences
from utils.sources import Document, Source
from utils.stream import Row, StreamArguments, TrainingStream

FORMATS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]
LANES, LENGTH = 16, 48
ALWAYS = 10_000  # documents or steps, more than any test has


def write(folder: Path, records: list[dict], format: str = ".jsonl") -> str:
    """A folder with one file, in several gzip members, zstd frames or row groups."""
    folder.mkdir()
    if format == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), folder / "data.parquet", row_group_size=9)
    else:
        pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}
        lines = [json.dumps(record).encode() + b"\n" for record in records]
        pieces = [b"".join(lines[i : i + 9]) for i in range(0, len(lines), 9)]
        (folder / f"data{format}").write_bytes(b"".join(map(pack[format], pieces)))
    return str(folder)


@pytest.fixture(params=FORMATS)
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> list[Source]:
    """Two sources of a format, of which the first leaves after two epochs."""
    small = write(tmp_path / "small", make_documents("small", 24, seed=1), request.param)
    big = write(tmp_path / "big", make_documents("big", 70, seed=2), request.param)
    domain = "meta.redpajama_set_name"
    return [
        Source(small, "small", weight=2, epochs=2, domain_field=domain),
        Source(big, "big", weight=1, domain_field=domain),
    ]


class Run:
    """A run of any world size over one mixture."""

    def __init__(
        self, sources: list[Source], tokenizer, seed: int = 0, rows_per_lane: int = 2, **settings
    ):
        self.sources, self.encode, self.seed = sources, DocumentEncoder(tokenizer), seed
        settings = {"lanes": LANES, "shuffle_documents": 4, **settings}
        batch = rows_per_lane * settings["lanes"]
        self.arguments = Arguments(
            train_sources=sources, seed=seed, global_batch_size=batch, **settings
        )
        self.rows_per_lane = rows_per_lane

    def corpus(self) -> Corpus:
        return Corpus(self.arguments)

    def stream(self) -> TrainingStream:
        lanes = Lanes(self.corpus(), self.encode)
        return TrainingStream(lanes, partial(packed_rows, lanes, LENGTH), self.arguments)

    def steps(self, count: int, world_size: int = 1, states: dict | None = None) -> list[list[Row]]:
        """The rows of all ranks together; ends when none has tokens."""
        ranks = [self.stream().rows(rank, world_size, states) for rank in range(world_size)]
        steps: list[list[Row]] = []
        for _ in range(count):
            parts = [next(rank) for rank in ranks]
            for rank, part in enumerate(parts):
                lanes = range(rank, self.arguments.lanes, world_size)
                assert [row.lane for row in part] == [
                    lane for lane in lanes for _ in range(self.rows_per_lane)
                ]
            rows = [row for part in parts for row in part]
            if not any(row.tokens for row in rows):
                break
            steps.append(sorted(rows, key=lambda row: row.lane))
        return steps


def plain(step: list[Row]) -> list:
    """A step as values that are equal only when every bit of it is."""
    return [
        (row.lane, row.tokens, row.state, {k: a.tolist() for k, a in row.features.items()})
        for row in step
    ]


def states_after(step: list[Row]) -> dict[int, dict]:
    """As a checkpoint keeps them."""
    states = json.loads(json.dumps({row.lane: row.state for row in step}))
    return {int(lane): state for lane, state in states.items()}


class ForkingLoader(torch.utils.data.DataLoader):
    """Workers that start at once; those that runs have are spawned, which takes seconds."""

    def __init__(self, *args, multiprocessing_context, **settings):
        super().__init__(*args, multiprocessing_context="fork", **settings)


def words(texts: list[str]) -> list[list[str]]:
    """An encoder for tests of lanes alone: its tokens are words."""
    return [text.split() for text in texts]


def make_lane(sources: list[Source], state: dict | None = None, index: int = 0, **settings) -> Lane:
    corpus = corpus_of(sources, **{"lanes": 1, "shuffle_documents": 8, **settings})
    return Lane(Lanes(corpus, words), index, state)


def drain(lane: Lane, limit: int = ALWAYS) -> list[Document]:
    documents: list[Document] = []
    while len(documents) < limit and (item := lane.next()):
        documents.append(item[1])
    return documents


# the order is a function of the settings, the seed and the step alone


def test_world_sizes_do_not_change_a_step(mixture, tokenizer):
    expected = list(map(plain, Run(mixture, tokenizer).steps(12)))
    assert len({str(step) for step in expected}) == 12
    for world_size in (2, 4, 8):
        assert list(map(plain, Run(mixture, tokenizer).steps(12, world_size))) == expected


@pytest.mark.parametrize("mixture", [".parquet"], indirect=True)
def test_workers_do_not_change_a_step(mixture, tokenizer, monkeypatch):
    expected = list(map(plain, Run(mixture, tokenizer).steps(12)))
    monkeypatch.setattr(torch.utils.data, "DataLoader", ForkingLoader)
    for world_size in (1, 2, 4, 8):
        steps = Run(mixture, tokenizer, dataloader_num_workers=2).steps(12, world_size)
        assert list(map(plain, steps)) == expected


@pytest.mark.parametrize("mixture", [".parquet"], indirect=True)
def test_a_rank_has_no_more_workers_than_lanes(mixture, tokenizer, monkeypatch):
    """What is set for 8 processes starts on 64."""
    started = []

    class Counted(ForkingLoader):
        def __init__(self, *args, num_workers, **settings):
            started.append(num_workers)
            super().__init__(*args, num_workers=num_workers, **settings)

    monkeypatch.setattr(torch.utils.data, "DataLoader", Counted)
    run = Run(mixture, tokenizer, lanes=8, dataloader_num_workers=3)
    steps = [list(map(plain, run.steps(2, world_size))) for world_size in (8, 4, 1)]
    assert started == [1] * 8 + [2] * 4 + [3]
    assert steps[0] == steps[1] == steps[2]


def test_workers_as_runs_start_them(tmp_path, tokenizer):
    """Special tokens are text for them, too; errors arrive as they are; nothing stays behind."""
    records = [{"text": f"{i} <|end_of_text|> {'x' * i}"} for i in range(40)] + [{"broken": 1}]
    source = Source(write(tmp_path / "data", records), epochs=1)
    settings = {"lanes": 2, "shuffle_documents": 4}
    expected = Run([source], tokenizer, on_bad_record="skip", **settings).steps(ALWAYS)
    steps = Run([source], tokenizer, dataloader_num_workers=2, **settings).stream().rows(0, 1)
    found = [next(steps)]
    workers = multiprocessing.active_children()
    # a signal to the process group of the run does not reach them
    assert len({os.getpgrp(), *(os.getpgid(worker.pid) for worker in workers)}) == 3
    with pytest.raises(InputError) as error:
        found.extend(steps)
    assert str(error.value) == (
        f"{tmp_path}/data/data.jsonl, line 41: no field 'text' (it has: broken); "
        "--on_bad_record skip leaves such records out"
    )
    assert list(map(plain, found)) == list(map(plain, expected[: len(found)]))
    assert len(found) > 3
    assert not any(worker.is_alive() for worker in workers)


def test_seed_decides_the_order_and_the_folder_does_not(mixture, tokenizer, tmp_path):
    expected = list(map(plain, Run(mixture, tokenizer).steps(5)))
    assert list(map(plain, Run(mixture, tokenizer, seed=1).steps(5))) != expected
    fingerprint = Run(mixture, tokenizer).corpus().fingerprint()
    for source in mixture:
        source.path = shutil.move(source.path, tmp_path / f"moved-{source.label}")
    assert list(map(plain, Run(mixture, tokenizer).steps(5))) == expected
    assert Run(mixture, tokenizer).corpus().fingerprint() == fingerprint


def test_permutations_are_the_same_for_ever():
    assert keyed_permutation(8, 0, "shards", 0, 0) == [6, 0, 7, 4, 2, 3, 5, 1]
    assert keyed_permutation(8, 0, "shards", 0, 1) == [1, 5, 0, 7, 6, 3, 4, 2]
    assert keyed_permutation(10, 17, "chunk", 1, 2, 3, None) == [9, 6, 1, 2, 3, 7, 5, 4, 0, 8]
    assert keyed_permutation(0, "none") == []
    assert sorted(keyed_permutation(1000, "many")) == list(range(1000))


def test_a_chunk_ends_after_so_many_documents_or_bytes(tmp_path):
    texts = [f"{i:03} " + "é" * 48 for i in range(60)]  # 100 bytes each
    source = Source(write(tmp_path / "data", [{"text": text} for text in texts]), epochs=1)
    for settings, length in (
        ({"shuffle_documents": 7}, 7),
        ({"shuffle_bytes": 450}, 5),
        ({"shuffle_bytes": 500}, 5),
        ({"shuffle_documents": 3, "shuffle_bytes": 500}, 3),
        ({"shuffle_documents": 1}, 1),
        ({"shuffle_bytes": 1}, 1),
    ):
        lane = make_lane([source], **{"shuffle_documents": 1000, **settings})
        found = [document.text for document in drain(lane)]
        chunks = [found[i : i + length] for i in range(0, 60, length)]
        assert [sorted(chunk) for chunk in chunks] == [
            texts[i : i + length] for i in range(0, 60, length)
        ]
        assert (found == texts) == (length == 1)


def test_chunks_and_shards_are_permuted_anew_every_epoch(tmp_path):
    write(tmp_path / "data", [])
    for name in "abc":
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", make_documents(name, 20))
    documents = drain(make_lane([Source(str(tmp_path / "data"), epochs=4)], lanes=1))
    epochs = [[d.text for d in documents[i : i + 60]] for i in range(0, 240, 60)]
    for name in "abc":
        assert len({tuple(text for text in epoch if text[0] == name) for epoch in epochs}) == 4
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({"".join(text[0] for text in epoch) for epoch in epochs}) > 1


# a run goes on exactly where it was


def test_resuming_after_any_step_and_at_any_world_size(mixture, tokenizer):
    steps = Run(mixture, tokenizer).steps(60)
    expected = list(map(plain, steps))
    # both sources have passed an epoch, and the first has left
    places = np.array([row.state["lane"]["places"] for row in steps[-1]], dtype=object)
    assert (places[:, 0, 0] == 2).all()
    assert (places[:, 1, 0] >= 2).all()
    # every step of one format, every third of the others
    for done in range(1, 58, 1 if "data.jsonl" in os.listdir(mixture[0].path) else 3):
        states, world_size = states_after(steps[done - 1]), (1, 2, 4, 8)[done % 4]
        resumed = Run(mixture, tokenizer).steps(2, world_size, states)
        assert list(map(plain, resumed)) == expected[done : done + 2], f"after step {done}"


def test_resuming_again_and_again(mixture, tokenizer):
    expected = list(map(plain, Run(mixture, tokenizer).steps(40)))
    steps: list[list[Row]] = []
    while len(steps) < 40:
        states = states_after(steps[-1]) if steps else None
        steps += Run(mixture, tokenizer).steps(
            1 + len(steps) % 3, (1, 8, 2)[len(steps) % 3], states
        )
    assert list(map(plain, steps[:40])) == expected


@pytest.mark.parametrize("mixture", [".jsonl.zst"], indirect=True)
def test_prefetched_rows_are_not_lost(mixture, tokenizer, monkeypatch):
    monkeypatch.setattr(torch.utils.data, "DataLoader", ForkingLoader)
    steps = Run(mixture, tokenizer, dataloader_num_workers=2).steps(8)
    resumed = Run(mixture, tokenizer, dataloader_num_workers=2).steps(4, 2, states_after(steps[3]))
    assert list(map(plain, resumed)) == list(map(plain, steps[4:]))


def test_resuming_after_any_document_while_sources_leave(tmp_path):
    # lengths for which a source that has left, taken for present, changes which comes next
    lengths = [[2, 2, 1], [2, 10, 7, 7, 1, 4], [1], [3, 20, 2]]
    mixture = []
    for name, weight, counts in zip("abcd", [2, 5, 1, 2], lengths, strict=True):
        texts = [f"{name}{i} " + "word " * (count - 1) for i, count in enumerate(counts)]
        path = write(tmp_path / name, [{"text": text} for text in texts])
        mixture.append(Source(path, name, weight, epochs=1))
    lane, states, documents = make_lane(mixture, shuffle_documents=1), [], []
    while item := lane.next():
        documents.append(item[1])
        states.append(json.loads(json.dumps(lane.state())))
    assert len(documents) == 13
    for done, state in enumerate(states, 1):
        assert drain(Lane(lane.lanes, 0, state)) == documents[done:], f"after document {done}"


@pytest.mark.parametrize("format", FORMATS)
def test_a_resume_reads_one_chunk(tmp_path, format, monkeypatch):
    source = Source(write(tmp_path / "data", make_documents("data", 400), format))
    lane = make_lane([source])
    drain(lane, 300)
    state = lane.state()
    read, decoded = [], []
    document = sources._document
    monkeypatch.setattr(
        sources, "_document", lambda *a: decoded.append(document(*a)) or decoded[-1]
    )
    resumed = make_lane([source], state)
    decoded.clear()  # the corpus has looked at its first document
    monkeypatch.setattr(
        resumed.lanes, "encode", lambda texts: read.append(len(texts)) or words(texts)
    )
    resumed.next()
    assert len(decoded) == 8
    assert read == [1]


def test_few_documents_are_tokenized_before_the_first_row(tmp_path):
    source = Source(write(tmp_path / "data", make_documents("data", 100)))
    sizes: list[int] = []
    lane = make_lane([source], shuffle_documents=1000)
    lane.lanes.encode = lambda texts: sizes.append(len(texts)) or words(texts)
    drain(lane, 100)
    assert sizes == [1, 2, 4, 8, 16, 16, 16, 16, 16, 5]


def test_state_is_small(tmp_path, tokenizer):
    names = ["CommonCrawl", "C4", "Github", "Book", "ArXiv", "Wikipedia", "StackExchange"]
    mixture = [
        Source(write(tmp_path / name, make_documents(name, 64)), name, weight=1 + index)
        for index, name in enumerate(names)
    ]
    run = Run(mixture, tokenizer, lanes=64)
    states = states_after(run.steps(1)[0])
    assert len(states) == 64
    for state in states.values():  # numbers as they are late in a run over terabytes
        state["seen"] = dict.fromkeys(names, 10**11)
        state["lane"]["tokens"] = [10**11] * 7
        state["lane"]["places"] = [[99, 9999, 10**11, 511]] * 7
    assert len(json.dumps(states)) < 60_000


# every document once an epoch


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("world_size", [1, 4])
def test_every_token_and_every_target_once_an_epoch(tmp_path, format, world_size, tokenizer):
    records = make_documents("a", 75)
    run = Run([Source(write(tmp_path / "data", records, format), epochs=3)], tokenizer)
    lanes: dict[int, list[tuple[int, int]]] = {lane: [] for lane in range(LANES)}
    for step in run.steps(ALWAYS, world_size):
        for row in step:
            tokens, labels = (row.features[name] for name in ("input_ids", "shift_labels"))
            assert (labels[row.tokens :] == IGNORE_INDEX).all()
            lanes[row.lane] += list(zip(tokens, labels, strict=True))[: row.tokens]
    found: list[tuple] = []
    for pairs in lanes.values():
        for token, label in pairs:
            if token == tokenizer.bos_token_id:
                found.append(())
            found[-1] += ((token, label),)
    expected = [
        tuple(zip(tokens, [*tokens[1:], IGNORE_INDEX], strict=True))
        for tokens in run.encode([record["text"] for record in records])
    ]
    assert Counter(found) == Counter(expected * 3)


@pytest.mark.parametrize("lanes", [1, 3, 8, 100])
def test_epochs_hold_every_document_once(tmp_path, lanes):
    for count in (1, 2, 37):
        source = Source(write(tmp_path / str(count), make_documents("a", count)), epochs=3)
        seen = []
        for index in range(lanes):
            lane = make_lane([source], index=index, lanes=lanes)
            while item := lane.next():
                seen.append((lane.cursors[0].epoch, item[1].position))
        assert len(seen) == len(set(seen)) == 3 * count


def test_lanes_of_different_lengths_end_together(tmp_path, tokenizer):
    records = [{"text": "word " * (500 if i == 0 else 1)} for i in range(40)]
    source = Source(write(tmp_path / "data", records), epochs=1)
    for world_size in (1, 2, 8):
        run = Run([source], tokenizer, rows_per_lane=1)
        ranks = [run.stream().rows(rank, world_size) for rank in range(world_size)]
        steps = [[next(rank) for rank in ranks] for _ in range(60)]
        with_tokens = [any(row.tokens for rank in step for row in rank) for step in steps]
        assert with_tokens == [True] * sum(with_tokens) + [False] * (60 - sum(with_tokens))
        last = [row for rank in steps[-1] for row in rank]
        longest = max(sum(row.state["seen"].values()) for row in last)
        assert sum(with_tokens) == math.ceil(longest / LENGTH) > 30
        assert [len(rank) for rank in steps[-1]] == [LANES // world_size] * world_size
        assert all((row.features["shift_labels"] == IGNORE_INDEX).all() for row in last)
        # a finished run that is started again goes on giving rows without targets
        assert run.steps(1, world_size, states_after(last)) == []


def test_fewer_documents_than_lanes(tmp_path):
    source = Source(write(tmp_path / "data", make_documents("a", 3)))
    documents = [drain(make_lane([source], index=index, lanes=32), 5) for index in range(32)]
    assert all(len(lane) == 5 for lane in documents)
    assert {d.position for lane in documents for d in lane} == {
        d.position for d in drain(make_lane([source]), 3)
    }


def test_a_source_that_loses_its_documents_does_not_search_for_ever(tmp_path):
    source = Source(write(tmp_path / "data", make_documents("a", 3)))
    lane = make_lane([source])
    (tmp_path / "data" / "data.jsonl").write_text("")
    with pytest.raises(InputError) as error:
        lane.next()
    assert str(error.value) == f"source {source.path!r}: lane 0 finds no document in it"


# mixing


def test_tokens_follow_the_weights(tmp_path):
    weights = {"a": 5, "b": 3, "c": 2}
    mixture = [
        Source(write(tmp_path / name, make_documents(name, 60, seed)), name, weight)
        for seed, (name, weight) in enumerate(weights.items())
    ]
    for index in range(2):
        lane, longest = make_lane(mixture, index=index, lanes=2), 0
        for _ in range(500):
            encoded, _, _ = lane.next()
            longest = max(longest, len(encoded))
            for source, tokens in zip(mixture, lane.tokens, strict=True):
                assert abs(tokens - sum(lane.tokens) * source.weight / 10) <= longest


def test_a_source_that_is_spent_leaves_and_the_others_keep_their_ratio(tmp_path):
    mixture = [
        Source(write(tmp_path / name, make_documents(name, 60)), name, weight, epochs)
        for name, weight, epochs in (("a", 6, 1), ("b", 3, None), ("c", 1, None), ("d", 0, None))
    ]
    lane = make_lane(mixture)
    names = [lane.next()[2].label for _ in range(600)]
    assert Counter(names)["a"] == 60
    assert "a" not in names[200:]
    assert "d" not in names
    assert lane.tokens[1] / lane.tokens[2] == pytest.approx(3, rel=0.02)


def test_without_weights_there_is_no_mixture(tmp_path, tokenizer):
    path = write(tmp_path / "data", make_documents("a", 3))
    with pytest.raises(InputError, match="the weights of the sources must be positive"):
        Run([Source(path, weight=0)], tokenizer).corpus()
    with pytest.raises(InputError, match="no sources"):
        Run([], tokenizer).corpus()


# broken records and files


def break_some(folder: str) -> int:
    """Breaks every tenth line, the last included; returns how many."""
    file = Path(folder) / "data.jsonl"
    lines = file.read_text().splitlines()
    for number in range(9, len(lines), 10):
        lines[number] = lines[number][: len(lines[number]) // 2]
    file.write_text("\n".join(lines))
    return len(lines) // 10


@pytest.mark.parametrize("lanes", [1, 16])
def test_skipped_records_are_counted_once(tmp_path, tokenizer, capsys, lanes):
    source = Source(write(tmp_path / "data", make_documents("a", 100)), epochs=2)
    broken = break_some(source.path)
    run = Run([source], tokenizer, on_bad_record="skip", lanes=lanes)
    steps = run.steps(ALWAYS)
    state = states_after(run.steps(1, states=states_after(steps[-1])) or steps[-1])
    assert sum(lane["lane"]["bad_records"] for lane in state.values()) == 2 * broken
    assert sum(lane["lane"]["documents"] for lane in state.values()) == 2 * (100 - broken)
    assert "data.jsonl, line 10: not JSON" in capsys.readouterr().err
    # also when the run is cut after every step
    again: list[list[Row]] = []
    while step := run.steps(1, states=states_after(again[-1]) if again else None):
        again += step
    assert list(map(plain, again)) == list(map(plain, steps))


def test_only_the_first_of_many_broken_records_are_shown(tmp_path, capsys):
    records = [{"text": "a"}] + [{"content": "a"}] * 100 + [{"text": "b"}]
    lane = make_lane([Source(write(tmp_path / "data", records), epochs=1)], on_bad_record="skip")
    assert len(drain(lane)) == 2
    assert lane.state()["bad_records"] == 100
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 20
    assert warnings[0].endswith("data.jsonl, line 2: no field 'text' (it has: content)")
    assert warnings[-1].endswith(
        "line 21: no field 'text' (it has: content); more are only counted"
    )


def test_a_broken_record_is_named_once_however_often_it_is_read(tmp_path, capsys):
    source = Source(write(tmp_path / "data", make_documents("a", 100)), epochs=3)
    broken = break_some(source.path)
    lane = make_lane([source], on_bad_record="skip")
    drain(lane)
    assert lane.state()["bad_records"] == 3 * broken
    assert len(capsys.readouterr().err.splitlines()) == broken


def test_a_broken_record_ends_the_run_with_its_line(tmp_path, tokenizer):
    source = Source(write(tmp_path / "data", make_documents("a", 100)))
    break_some(source.path)
    with pytest.raises(InputError, match=r"data\.jsonl, line \d+0: not JSON: .*; --on_bad_record"):
        Run([source], tokenizer).steps(ALWAYS)


def test_a_broken_file_is_skipped_and_counted_once(tmp_path, monkeypatch):
    """However often its reader is closed to make room for others, and reopened."""
    mixture = [
        Source(write(tmp_path / name, make_documents(name, 40), ".jsonl.gz"), name, epochs=1)
        for name in "ab"
    ]
    for source in mixture:
        file = Path(source.path) / "data.jsonl.gz"
        file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"data\.jsonl\.gz, after line \d+: Compressed file ended"):
        drain(make_lane(mixture))
    expected = make_lane(mixture, on_bad_record="skip")
    documents = drain(expected)
    assert 60 < len(documents) < 80
    assert expected.state()["bad_records"] == 2
    monkeypatch.setattr(lanes, "OPEN_READERS", 1)
    lane = make_lane(mixture, on_bad_record="skip")
    assert drain(lane) == documents
    assert lane.state() == expected.state()


# open files


def open_files(folder: Path) -> int:
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.islink(link)]
    return sum(target.startswith(str(folder)) for target in targets)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts open files in /proc")
def test_readers_are_few_and_closing_them_changes_nothing(
    mixture, tokenizer, monkeypatch, tmp_path
):
    expected = list(map(plain, Run(mixture, tokenizer).steps(20)))
    for limit in (1, 5):
        monkeypatch.setattr(lanes, "OPEN_READERS", limit)
        stream = Run(mixture, tokenizer).stream()
        assert open_files(tmp_path) == 0
        steps = stream.rows(0, 1)
        for step in expected:
            assert plain(next(steps)) == step
            assert open_files(tmp_path) <= limit
        del steps
        assert open_files(tmp_path) == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts open files in /proc")
def test_many_lanes_and_sources_do_not_mean_many_open_files(tmp_path):
    mixture = [Source(write(tmp_path / str(i), make_documents(str(i), 400))) for i in range(6)]
    lanes = Lanes(corpus_of(mixture, shuffle_documents=1), words)
    every_lane = [Lane(lanes, index) for index in range(64)]
    for _ in range(6):
        for lane in every_lane:
            lane.next()
    assert 200 < open_files(tmp_path) <= 256
    lanes.close()
    assert open_files(tmp_path) == 0


# settings


def test_the_fingerprint_tells_what_changes_the_order(tmp_path):
    def fingerprint(source: dict | None = None, **settings) -> dict:
        entry = Source(str(tmp_path / "data"), **(source or {}))
        return corpus_of([entry], **settings).fingerprint()

    write(tmp_path / "data", make_documents("a", 20))
    first = fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert fingerprint(dataloader_num_workers=2) == first
    assert fingerprint(on_bad_record="skip") == first  # a run that stopped at a record may go on
    for settings in ({"lanes": 8}, {"shuffle_documents": 9}, {"shuffle_bytes": 9}):
        assert [name for name, *_ in differences(first, fingerprint(**settings))] == [*settings]
    for source in ({"weight": 2}, {"epochs": 1}, {"domain_field": "meta"}):
        changed = [name for name, *_ in differences(first, fingerprint(source))]
        assert changed == [*source, "sources and files"]
    older = [first[name] for name in DATA_ONCE]
    assert list(differences({"": older}, {"": first})) == []
    assert list(differences({"": older}, {"": fingerprint(lanes=8)})) == [(".lanes", 64, 8)]
    write_jsonl(tmp_path / "data" / "data.jsonl", make_documents("a", 21))
    changed = [name for name, *_ in differences(first, fingerprint())]
    assert changed == ["files", "sources and files"]


def test_lanes_that_do_not_fit(monkeypatch):
    def check(lanes: int, global_batch_size: int, processes: int) -> None:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        arguments = StreamArguments(lanes=lanes)
        # of the TrainingArguments beside it
        arguments.global_batch_size, arguments.num_train_epochs = global_batch_size, None
        arguments.check()

    check(lanes=64, global_batch_size=128, processes=8)
    check(lanes=192, global_batch_size=192, processes=24)
    with pytest.raises(InputError, match="lanes: 64 do not fit: global_batch_size 96 must be a"):
        check(lanes=64, global_batch_size=96, processes=8)
    with pytest.raises(InputError, match=r"lanes: 64 cannot be dealt to 24 processes: .* 192$"):
        check(lanes=64, global_batch_size=64, processes=24)


class PanicException(BaseException):
    """What Rust raises: pyo3_runtime has no name for it before it has."""


def panic_on(tokenizer, word: str):
    """An encoder that fails on texts with a word in them, as regular expressions on long blanks."""
    encode = DocumentEncoder(tokenizer)

    def fail(texts: list[str]) -> list:
        if any(word in text for text in texts):
            raise PanicException("retry-limit-in-match over")
        return encode(texts)

    return fail


@pytest.mark.parametrize("lanes", [1, 16])
def test_documents_on_which_the_tokenizer_fails_are_bad_records(tmp_path, tokenizer, capsys, lanes):
    records = make_documents("a", 100)
    for record in records[3::10]:
        record["text"] += "PANIC"
    source = Source(write(tmp_path / "data", records), epochs=2)
    run = Run([source], tokenizer, on_bad_record="skip", lanes=lanes)
    run.encode = panic_on(tokenizer, "PANIC")
    steps = run.steps(ALWAYS)
    state = states_after(run.steps(1, states=states_after(steps[-1])) or steps[-1])
    assert sum(lane["lane"]["bad_records"] for lane in state.values()) == 20
    assert sum(lane["lane"]["documents"] for lane in state.values()) == 180
    assert "data.jsonl, line 4: the tokenizer fails on its " in capsys.readouterr().err
    # also when the run is cut after every step
    again: list[list[Row]] = []
    while step := run.steps(1, states=states_after(again[-1]) if again else None):
        again += step
    assert list(map(plain, again)) == list(map(plain, steps))

    run.arguments.on_bad_record = "fail"
    with pytest.raises(InputError, match=r"data\.jsonl, line \d*4: the tokenizer fails on its \d+"):
        run.steps(ALWAYS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_no_fault_of_a_document_stops(tmp_path, tokenizer, error):
    def stop(texts: list[str]) -> list:
        raise error

    source = Source(write(tmp_path / "data", make_documents("a", 9)))
    with pytest.raises(error):
        Lane(Lanes(corpus_of([source], on_bad_record="skip", lanes=1), stop), 0).next()
