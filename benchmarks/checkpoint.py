"""What it takes to write a checkpoint and to go on from it, checksums included.

    python -m benchmarks.checkpoint

A Llama of 135M parameters with AdamW's state, in fp32, in one process. All take turns: the recipes'
checkpoints, the same without a look at their checksums, and `Accelerator.save_state` and
`load_state`, which have none. Files are read once from the disk and once from memory.
Results: benchmarks/results/checkpoint.md and .json.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import transformers
from accelerate import Accelerator

from benchmarks.measurement import describe, median_and_range, ratios, write_results
from utils import checkpoint
from utils.config import InputError, command, parse
from utils.files import remove
from utils.report import markdown_table

OURS, BARE, ACCELERATE = "recipes", "recipes, without checksums", "accelerate"
WAYS = ("write", "load from the disk", "load from memory")


@dataclass
class Arguments:
    """Measure writing and loading of checkpoints beside Accelerate's."""

    folder: str | None = None  # where the checkpoints are written; null: a temporary one
    turns: int = 5
    results: str = "benchmarks/results/checkpoint"

    def check(self) -> None:
        if self.turns < 1:
            raise InputError(f"turns must be 1 or more, not {self.turns}")


def trained_model() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """SmolLM2-135M's shape, after one step."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 2, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    return model, optimizer


def forget(folder: Path) -> int:
    """Take files out of memory, so that the next to read them waits for the disk; their bytes."""
    size = 0
    for file in filter(Path.is_file, folder.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        size += file.stat().st_size
    return size


def timed(function: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main() -> None:
    args = parse(Arguments)
    facts = describe("python -m benchmarks.checkpoint", ("torch", "accelerate", "safetensors"))
    model, optimizer = trained_model()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    seconds = {way: {name: [] for name in (OURS, BARE, ACCELERATE)} for way in WAYS}
    with TemporaryDirectory(dir=args.folder) as folder:
        ours, theirs = Path(folder, "step-00000001"), Path(folder, "accelerate")
        unread = patch.object(checkpoint, "verify", lambda *_: None)
        unwritten = patch.object(checkpoint, "size_and_checksum", lambda file: file.stat().st_size)
        for turn in range(args.turns):
            for way, found in seconds.items():
                for name, values in found.items():
                    place = theirs if name == ACCELERATE else ours
                    if way == "write":
                        remove(place)
                        save = [checkpoint.save, ours, model, optimizer, {}]
                        job = [accelerator.save_state, str(theirs)] if place == theirs else save
                    else:
                        size = forget(place)
                        load = [checkpoint.load, ours, model, optimizer.optimizer, 1]
                        job = [accelerator.load_state, str(theirs)] if place == theirs else load
                        if way == "load from memory":
                            for file in filter(Path.is_file, place.rglob("*")):
                                file.read_bytes()
                    patched = unwritten if way == "write" else unread
                    if name == BARE:
                        with patched:
                            values.append(timed(*job))
                    else:
                        values.append(timed(*job))
                    print(f"turn {turn + 1}: {way}, {name}: {values[-1]:.2f} s", flush=True)
    rows = []
    for way, found in seconds.items():
        others = [ratios(found[OURS], found[name]) for name in (BARE, ACCELERATE)]
        shares = [median_and_range(values, ".0%") for values in others]
        rows.append([way, *(median_and_range(v, ".2f") for v in found.values()), *shares])
    header = ["seconds to", OURS, BARE, ACCELERATE, "of the one without", "of accelerate"]
    text = markdown_table(header, rows, "lrrrrr")
    text += f"\n\nMedians (least to most) of {args.turns} turns; shares are of one turn. "
    text += f"{size / 1e9:.2f} GB."
    write_results(args.results, text, facts, {"seconds": seconds})


if __name__ == "__main__":
    command(main)
