"""Speed of the document stream on one core, and what starting and resuming it costs.

    python -m benchmarks.stream

The peers take turns of a quarter of a second in one process, pinned to one core, over the same
documents. Seconds are those of the process's own CPU time, so that other programs on the machine
count as little as they can; how much longer the clock on the wall ran is printed, too. Results:
benchmarks/results/stream.md and .json.
"""

import json
import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pyarrow
import pyarrow.parquet
import zstandard
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.measurement import describe, median_and_range, ratios, write_results
from packing import DocumentEncoder, packed_rows
from recipes.causal_lm import pretrain
from utils.config import command, parse
from utils.lanes import ENCODE_BATCH, Corpus, Lanes
from utils.report import markdown_table
from utils.sources import Source, find_files
from utils.stream import Row, TrainingStream

TURN = 2**18  # tokens
BARE = "`tokenizers`, texts in memory"


@dataclass
class Arguments:
    """Measure the stream beside bare `tokenizers` and beside `datasets`."""

    path: str = "data/sample/train-00000-*.jsonl"
    tokenizer: str = "data/tokenizers/bpe-8192"
    sequence_length: int = 1024
    lanes: int = 64
    world_size: int = 8  # of the run whose first rank is started and resumed, beside one alone
    rounds: int = 9
    turns: int = 12  # of each peer in a round
    results: str = "benchmarks/results/stream"


def steps_of(
    args: Arguments, tokenizer: PreTrainedTokenizerBase, path: str, world_size: int = 1, states=None
) -> Iterator[list[Row]]:
    """The rows of rank 0, one a lane and step, epoch after epoch."""
    source = Source(path, label="sample", domain_field="meta.redpajama_set_name")
    settings = pretrain.Arguments(
        train_sources=[source], lanes=args.lanes, global_batch_size=args.lanes
    )
    lanes = Lanes(Corpus(settings), DocumentEncoder(tokenizer))
    rows_of = partial(packed_rows, lanes, args.sequence_length)
    return TrainingStream(lanes, rows_of, settings).rows(0, world_size, states)


def stream(args: Arguments, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Tokens read, shuffled, mixed, tokenized and packed, with the state of each row."""
    for rows in steps_of(args, tokenizer, args.path):
        yield sum(row.tokens for row in rows)


def bare(encode: DocumentEncoder, texts: Callable[[], Iterable[str]]) -> Iterator[int]:
    """Tokens by `tokenizers` alone."""
    while True:
        for batch in batched(texts(), ENCODE_BATCH):
            encodings = encode.backend.encode_batch_fast(batch, add_special_tokens=False)
            yield sum(len(encoding.ids) + 2 for encoding in encodings)  # begin and end


def datasets_map(args: Arguments, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Tokens by `datasets`: streamed, and mapped in batches; neither shuffled nor packed."""
    lines = datasets.load_dataset(
        "json", data_files=find_files(Source(args.path)), split="train", streaming=True
    )
    as_text = {"add_special_tokens": False, "split_special_tokens": True}
    mapped = lines.map(
        lambda batch: {"input_ids": tokenizer(batch["text"], **as_text).input_ids},
        batched=True,
        batch_size=100,
        remove_columns=list(next(iter(lines))),
    )
    while True:
        for example in mapped:
            yield len(example["input_ids"]) + 2


def read_texts(args: Arguments) -> Iterator[str]:
    for file in find_files(Source(args.path)):
        with open(file, "rb") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def measure_speeds(args: Arguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Peer → (tokens, CPU seconds, wall seconds) of each round."""
    encode, texts = DocumentEncoder(tokenizer), list(read_texts(args))
    peers = {
        "this stream": stream(args, tokenizer),
        BARE: bare(encode, lambda: texts),
        "`tokenizers`, reading JSON lines": bare(encode, lambda: read_texts(args)),
        "`datasets`, streaming and batched map": datasets_map(args, tokenizer),
    }
    for peer in peers.values():
        next(peer)  # the files are open
    rounds: dict[str, list] = {name: [] for name in peers}
    for _ in range(args.rounds):
        sums = {name: (0, 0.0, 0.0) for name in peers}
        for _ in range(args.turns):
            for name, peer in peers.items():
                tokens, cpu, wall = 0, time.process_time(), time.perf_counter()
                while tokens < TURN:
                    tokens += next(peer)
                spent = tokens, time.process_time() - cpu, time.perf_counter() - wall
                sums[name] = tuple(a + b for a, b in zip(sums[name], spent, strict=True))
        for name, (tokens, cpu, wall) in sums.items():
            rounds[name].append((tokens, cpu, wall))
            print(f"{name}: {tokens / cpu:,.0f} tokens/s ({wall / cpu:.1f})", flush=True)
    for peer in peers.values():
        peer.close()
    return rounds


def measure_resumes(args: Arguments, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """CPU seconds to the first step, new and in the middle, for each format and world size."""
    encode, found = DocumentEncoder(tokenizer), []
    middle = sum(map(len, encode(list(read_texts(args))))) // 2
    with TemporaryDirectory() as folder:
        for format in (".jsonl", ".jsonl.zst", ".parquet"):
            path = write_in_format(args, Path(folder) / format.strip("."), format)
            for world_size in (1, args.world_size):
                states = states_in_the_middle(args, tokenizer, path, world_size, middle)
                measured: dict[str, list[float]] = {"new": [], "resumed": []}
                for _ in range(args.rounds):
                    for name, given in (("new", None), ("resumed", states)):
                        start = time.process_time()
                        steps = steps_of(args, tokenizer, path, world_size, given)
                        next(steps)
                        measured[name].append(time.process_time() - start)
                        steps.close()
                size = len(json.dumps(states)) * world_size
                row = {"format": format, "world_size": world_size, "state_bytes": size, **measured}
                print(row, flush=True)
                found.append(row)
    return found


def write_in_format(args: Arguments, folder: Path, format: str) -> str:
    folder.mkdir()
    for file in map(Path, find_files(Source(args.path))):
        target = folder / f"{file.name.partition('.')[0]}{format}"
        if format == ".parquet":
            records = [json.loads(line) for line in file.open("rb")]
            table = pyarrow.Table.from_pylist(records)
            pyarrow.parquet.write_table(table, target, row_group_size=1000)
        elif format == ".jsonl.zst":
            target.write_bytes(zstandard.compress(file.read_bytes()))
        else:
            target.write_bytes(file.read_bytes())
    return str(folder)


def states_in_the_middle(
    args: Arguments, tokenizer: PreTrainedTokenizerBase, path: str, world_size: int, tokens: int
) -> dict[int, dict]:
    """The states of rank 0 after its part of so many tokens."""
    steps = steps_of(args, tokenizer, path, world_size)
    while tokens > 0:
        rows = next(steps)
        tokens -= world_size * sum(row.tokens for row in rows)
    steps.close()
    return {row.lane: row.state for row in rows}


def main() -> None:
    args = parse(Arguments)
    packages = ("tokenizers", "transformers", "datasets", "pyarrow", "zstandard", "numpy")
    facts = describe("python -m benchmarks.stream", packages)
    if hasattr(os, "sched_setaffinity"):
        core = max(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {core})
        facts["pinned to"] = f"core {core}"
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    speeds = measure_speeds(args, tokenizer)
    resumes = measure_resumes(args, tokenizer)
    text = as_tables(args, speeds, resumes)
    write_results(args.results, text, facts, {"rounds": speeds, "resumes": resumes})


def as_tables(args: Arguments, speeds: dict[str, list], resumes: list[dict]) -> str:
    rates = {name: [t / cpu for t, cpu, _ in rounds] for name, rounds in speeds.items()}
    rows = []
    for name, values in rates.items():
        of_bare = median_and_range(ratios(values, rates[BARE]), ".1%")
        rows.append([name, median_and_range(values, ",.0f"), of_bare])
    waited = statistics.median(wall / cpu for _, cpu, wall in speeds["this stream"])
    tokens = speeds["this stream"][0][0]
    lines = [
        markdown_table(["", "tokens/s", "of bare `tokenizers`"], rows, "lrr"),
        "",
        f"Medians (least to most) of {args.rounds} rounds of {tokens:,} tokens; ratios are of one "
        f"round. On the wall, the stream took {waited:.2f} times its CPU seconds.",
        "",
    ]
    header = ["ranks", "first step, new", "resumed in the middle", "state"]
    rows = []
    for row in resumes:
        new, resumed = (f"{statistics.median(row[name]):.2f} s" for name in ("new", "resumed"))
        size = f"{row['state_bytes'] / 1000:.0f} kB"
        rows.append([row["format"], row["world_size"], new, resumed, size])
    return "\n".join([*lines, markdown_table([f"{args.lanes} lanes of", *header], rows, "lrrrr")])


if __name__ == "__main__":
    command(main)
