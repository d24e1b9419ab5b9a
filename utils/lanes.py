"""The order of the documents: a corpus dealt to lanes, each with a place of a few numbers.

A lane reads its shards, shuffles them by chunk, mixes its sources by tokens and encodes, on its
own. What it gives next depends on the data settings, the seed and its place alone.
"""

import functools
import hashlib
import itertools
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from utils.config import InputError
from utils.program import announced
from utils.randomness import keyed_permutation
from utils.records import TEXTS, Shard, describe_position
from utils.sources import (
    DEFAULTS,
    BadRecord,
    BadRecords,
    Document,
    Source,
    check_documents,
    count_documents,
    read,
    too_many_domains,
)

ENCODE_BATCH = 16  # documents tokenized ahead; a resume tokenizes at most these again
LONG_TEXT = 2**21  # bytes that a tokenizer may take seconds for
OPEN_READERS = 256  # of one process; the one used longest ago is closed and reopens in place
MOST_LANES = 64  # unless a run says more
MAX_DOMAINS = 256  # each has a count in the state of every lane


def check_mixture(sources: list[Source]) -> None:
    """Raises InputError for weights, epochs or names that make no mixture."""
    if not sources:
        raise InputError("no sources: give at least one path")
    weights = [source.weight for source in sources]
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        shown = ", ".join(f"{source.path}: {source.weight:g}" for source in sources)
        raise InputError(f"the weights of the sources must be positive ({shown})")
    names = [source.log_name for source in sources]
    for source, name in zip(sources, names, strict=True):
        if names.count(name) > 1:
            raise InputError(f"two sources are called {name!r}: give each its own name")
        if source.epochs is not None and source.epochs < 1:
            raise InputError(f"source {name!r}: epochs must be at least 1, not {source.epochs}")


def choose_lanes(global_batch_size: int, documents: int) -> int:
    """So few that most of them find several documents in each epoch."""
    most = max(1, min(MOST_LANES, documents // 4))
    return max(n for n in range(1, most + 1) if global_batch_size % n == 0)


def cut_into_shards(files: list[str], lanes: int, is_whole: bool = False) -> list[Shard]:
    """Every document of the files in exactly one shard, and as many shards to every lane.

    A source of many files (16 a lane or more), or of one document a file (`is_whole`, one a lane or
    more) is not cut: a file is a shard. Otherwise every file
    is cut into the same number of parts, the fewest that deal out evenly. Each part of a
    compressed file costs decompressing all of it: there, many files, or a multiple of the lanes,
    are the fastest.
    """
    is_enough = len(files) >= (1 if is_whole else 16) * lanes
    parts = 1 if is_enough else lanes // math.gcd(len(files), lanes)
    return [Shard(file, part, parts) for file in files for part in range(parts)]


class Corpus:
    """The sources, cut into shards, and the order in which the lanes read them.

    Its `arguments` are those that it is given, with the number of lanes; `told` is a line for the
    screen of each source.

    Raises:
        InputError: nothing to read, a source without its text field, weights that sum to nothing.
    """

    def __init__(self, arguments: Any):
        a, self.seed = arguments, arguments.seed
        check_mixture(a.train_sources)
        times = None if a.num_train_epochs is None else int(a.num_train_epochs)
        self.sources = [
            replace(source, epochs=source.epochs or times) for source in a.train_sources
        ]
        self.files = check_documents(self.sources, a, most_domains=MAX_DOMAINS)
        if a.lanes is None:
            fewest = min(
                count_documents(source, files, 4 * MOST_LANES, a)
                for source, files in zip(self.sources, self.files, strict=True)
                if source.weight > 0
            )
            a = replace(a, lanes=choose_lanes(a.global_batch_size, fewest))
            a.check_lanes()
        self.arguments = a
        self.shards, self.told = [], []
        for source, files in zip(self.sources, self.files, strict=True):
            is_whole = source.sample_by == "document" and all(f.endswith(TEXTS) for f in files)
            self.shards.append(cut_into_shards(files, a.lanes, is_whole))
            of_each = ", each of them a document" if is_whole else ""
            self.told += [f"{source.log_name}: files {len(files):,}{of_each}; lanes {a.lanes}"]

    def fingerprint(self) -> dict[str, Any]:
        """By name, what the order of the documents depends on, besides the seed."""
        a = self.arguments
        # a file on the Hub is named by its commit; a local one by its size
        files = [
            [os.path.basename(file), os.path.getsize(file)] if os.path.exists(file) else file
            for file in itertools.chain(*self.files)
        ]
        names = ["weight", "epochs", "text_field", "domain_field"]
        names += ["sample_by"] * any(source.sample_by != "document" for source in self.sources)
        described = [[getattr(source, name) for name in names] for source in self.sources]
        order = ["lanes", "shuffle_documents", "shuffle_bytes"]
        order += ["max_document_bytes"] * (a.max_document_bytes != DEFAULTS.max_document_bytes)
        return {
            **{name: getattr(a, name) for name in order},
            **{name: [getattr(source, name) for source in self.sources] for name in names},
            "files": f"{len(files)} ({_digest(files)})",  # names and sizes
            "sources and files": _digest([described, files]),  # for older checkpoints
        }

    def shards_of(self, source: int, epoch: int, lane: int) -> list[int]:
        """Indices of a lane's shards of one epoch, in the order in which it reads them."""
        order = keyed_permutation(len(self.shards[source]), self.seed, "shards", source, epoch)
        return order[lane :: self.arguments.lanes]


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def encode_documents(
    encode: Callable[[list[str]], Sequence],
    documents: Sequence[Document],
    report: Callable[[BadRecord], None],
) -> list:
    """As `encode` has their texts; None for one on which the tokenizer fails, which is reported."""
    size = sum(document.size for document in documents)

    @functools.cache
    def doing() -> str:
        first = describe_position(documents[0].file, documents[0].position)
        return f"tokenizing {size / 1e6:.1f} MB from {first} on"

    try:
        with announced(doing, each_rank=True) if size > LONG_TEXT else nullcontext():
            return list(encode([document.text for document in documents]))
    except BaseException as error:  # a panic in Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if len(documents) > 1:
            return [e for one in documents for e in encode_documents(encode, [one], report)]
        text, _, position, end, file, _ = documents[0]
        problem = f"the tokenizer fails on its {len(text):,} characters: {error}"
        report(BadRecord(problem, position, end, file))
        return [None]


class Lanes:
    """What the lanes of a process share: corpus, encoder, open readers, the broken records seen.

    Args:
        encode: texts → one sequence of token ids (or whatever has a length in tokens) each.
    """

    def __init__(self, corpus: Corpus, encode: Callable[[list[str]], Sequence]):
        self.corpus, self.encode = corpus, encode
        self.bad_records = BadRecords(corpus.arguments.on_bad_record, one_rank=True)
        self._readers: OrderedDict[Cursor, None] = OrderedDict()

    def opened(self, cursor: "Cursor") -> None:
        """Note the use of a reader, and close the least recently used beyond the limit."""
        self._readers[cursor] = None
        self._readers.move_to_end(cursor)
        while len(self._readers) > OPEN_READERS:
            self._readers.popitem(last=False)[0].close()

    def close(self) -> None:
        while self._readers:
            self._readers.popitem()[0].close()


class Cursor:
    """The place of one lane in one source: (epoch, shard, start of the chunk, documents taken)."""

    def __init__(self, lanes: Lanes, source: int, lane: int, place: list[int | None]):
        self.lanes, self.source, self.lane = lanes, source, lane
        self.corpus = corpus = lanes.corpus
        self.epochs, self.path = corpus.sources[source].epochs, corpus.sources[source].path
        self.epoch, self.shard, self.start, self.taken = place
        self.reader: Iterator | None = None
        self.chunk: list[Document] | None = None
        self.position = self.start  # where the next chunk starts
        self.shard_ended = False  # with the current chunk
        self.bad_records = self.empty_epochs = 0  # in the current chunk; in a row
        self.encoded: list = []
        self.encode_batch = 1  # grows, so that the first row does not wait for many documents

    @property
    def place(self) -> list[int | None]:
        return [self.epoch, self.shard, self.start, self.taken]

    @property
    def spent(self) -> bool:
        return self.epochs is not None and self.epoch >= self.epochs

    def next(self, counts: dict[str, int]) -> tuple[Any, Document] | None:
        """The next encoded document, or None when the epochs of the source are spent."""
        while True:
            while self.chunk is None or self.taken >= len(self.chunk):
                if self.chunk is not None:
                    counts["bad_records"] += self.bad_records
                    self._leave_chunk()
                if self.spent:
                    return None
                self._read_chunk()
            if not self.encoded:
                ahead = self.chunk[self.taken : self.taken + self.encode_batch]
                report = self.lanes.bad_records.report
                self.encoded = encode_documents(self.lanes.encode, ahead, report)[::-1]
                self.encode_batch = min(2 * self.encode_batch, ENCODE_BATCH)
            document, encoded = self.chunk[self.taken], self.encoded.pop()
            self.taken += 1
            if encoded is not None:
                return encoded, document
            counts["bad_records"] += 1

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()
            self.reader = None

    def _read_chunk(self) -> None:
        """Read the documents from `start` on; there may be none."""
        corpus, limits = self.corpus, self.corpus.arguments
        index = corpus.shards_of(self.source, self.epoch, self.lane)[self.shard]
        if self.reader is None:
            shard, source = corpus.shards[self.source][index], corpus.sources[self.source]
            self.reader = read(shard, source, self.start, limits.max_document_bytes)
        self.lanes.opened(self)
        documents, size = [], 0
        self.bad_records, self.shard_ended = 0, True
        try:
            for item in self.reader:
                self.position = item.end
                if isinstance(item, BadRecord):
                    self.bad_records += 1
                    self.lanes.bad_records.report(item)
                    continue
                documents.append(item)
                size += item.size
                if len(documents) >= limits.shuffle_documents or size >= limits.shuffle_bytes:
                    self.shard_ended = False
                    break
        except OSError as error:
            self.bad_records += 1
            self.lanes.bad_records.report(error)
        key = (corpus.seed, "chunk", self.source, self.epoch, index, self.start)
        self.chunk = [documents[i] for i in keyed_permutation(len(documents), *key)]
        if documents:
            self.empty_epochs = 0

    def _leave_chunk(self) -> None:
        self.start, self.taken, self.chunk = self.position, 0, None
        if self.shard_ended:
            self.close()
            self.shard, self.start, self.position = self.shard + 1, None, None
        if self.shard == len(self.corpus.shards_of(self.source, self.epoch, self.lane)):
            # with fewer documents than lanes, a lane finds nothing in most epochs
            self.epoch, self.shard, self.empty_epochs = self.epoch + 1, 0, self.empty_epochs + 1
            if self.empty_epochs == 10_000:
                raise InputError(
                    f"source {self.path!r}: lane {self.lane} finds no document in it", one_rank=True
                )


class Lane:
    """One lane's documents, mixed by tokens: next is the source with the largest deficit.

    The deficit is weight x tokens so far - tokens of the source, over the sources that still have
    epochs to give: a source that has spent its epochs leaves, and the weights are renormalised.
    """

    def __init__(self, lanes: Lanes, index: int, state: dict[str, Any] | None = None):
        self.lanes, self.index = lanes, index
        count = len(lanes.corpus.sources)
        zero = {"tokens": [0] * count, "documents": 0, "bad_records": 0}
        state = state or {"places": [[0, 0, None, 0]] * count, **zero}
        self.cursors = [Cursor(lanes, i, index, place) for i, place in enumerate(state["places"])]
        self.tokens = list(state["tokens"])
        self.weights = [source.weight for source in lanes.corpus.sources]
        self.counts = {key: state[key] for key in ("documents", "bad_records")}
        self.active = [
            i for i, cursor in enumerate(self.cursors) if self.weights[i] > 0 and not cursor.spent
        ]

    @property
    def epochs(self) -> dict[str, int]:
        """By source, how often all of its documents have been read."""
        sources = self.lanes.corpus.sources
        return {s.log_name: c.epoch for s, c in zip(sources, self.cursors, strict=True)}

    def state(self) -> dict[str, Any]:
        """JSON from which a new lane continues with the next document."""
        places = [cursor.place for cursor in self.cursors]
        return {"places": places, "tokens": list(self.tokens), **self.counts}

    def next(self) -> tuple[Any, Document, Source] | None:
        """The next encoded document, or None when every source has spent its epochs."""
        weights, tokens = self.weights, self.tokens
        while self.active:
            share = sum(tokens[i] for i in self.active) / sum(weights[i] for i in self.active)
            source = max(self.active, key=lambda i: weights[i] * share - tokens[i])
            item = self.cursors[source].next(self.counts)
            if item is None:
                self.active.remove(source)
                continue
            encoded, document = item
            tokens[source] += len(encoded)
            self.counts["documents"] += 1
            return encoded, document, self.lanes.corpus.sources[source]
        return None


def count_tokens(seen: dict[str, int], source: Source, document: Document, tokens: int) -> None:
    """Add to the tokens seen of a document's source and domain.

    Raises:
        InputError: more domains than the state of a lane can hold.
    """
    name = source.log_name
    key = name if name == document.domain else f"{name}/{document.domain}"
    if key not in seen and len(seen) >= MAX_DOMAINS:
        raise too_many_domains(source, MAX_DOMAINS)
    seen[key] = seen.get(key, 0) + tokens
