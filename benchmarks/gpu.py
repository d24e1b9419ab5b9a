"""Recipes on one GPU: every smoke config in each precision, and the speed of pretraining.

    python -m benchmarks.gpu --measure smoke
    python -m benchmarks.gpu --measure speed

The first tells whether each smoke config runs in fp32, bf16 and fp16, how long it takes, and how
far its losses are from those of fp32. The second trains models of three sizes on packed rows of the
sample corpus, each in a process of its own: tokens per second, utilization and peak memory. Model
FLOPs are 6 N + 12 L A S a token over the dense bf16 peak. Results: benchmarks/results/gpu_smoke.md,
gpu_speed.md and .json.
"""

import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import transformers

from benchmarks.measurement import describe, write_results
from benchmarks.trainers import observe_recipe
from example_rows import example_rows
from masking import ExampleMaker
from packing import DocumentEncoder, packed_rows
from recipes.bert import pretrain as bert
from recipes.causal_lm import pretrain as causal_lm
from sentence_encoder import SentenceEncoder
from utils.config import InputError, command, parse
from utils.lanes import Corpus, Lanes
from utils.model import build_model, load_tokenizer, model_config
from utils.plan import flops_per_token
from utils.progress import PEAK_FLOPS
from utils.report import markdown_table
from utils.run_folder import RunFolder
from utils.stream import TrainingStream
from utils.training import Training

PACKAGES = ("torch", "transformers", "accelerate", "peft")
PRECISIONS = ("no", "bf16", "fp16")
AT_A_TIME = 6  # smoke configs
WARMUP, STEPS = 4, 8  # of a speed
LLAMA = {"model_type": "llama", "max_position_embeddings": 2048, "tie_word_embeddings": True}
SIZES = {
    "Llama of 125M, 32 x 2,048": {
        "model": LLAMA
        | {"vocab_size": 50304, "hidden_size": 768, "intermediate_size": 2048}
        | {"num_hidden_layers": 12, "num_attention_heads": 12},
        "per_device_batch_size": 32,
        "sequence_length": 2048,
    },
    "Llama of 1.1B, 8 x 2,048": {
        "model": LLAMA
        | {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192}
        | {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
        "per_device_batch_size": 8,
        "sequence_length": 2048,
    },
    "BERT-base, 256 x 128": {
        "model": {"model_type": "bert"},
        "per_device_batch_size": 256,
        "sequence_length": 128,
    },
}
WAYS = {
    "eager": {},
    "compiled": {"torch_compile": True},
    "compiled, flex attention": {"torch_compile": True, "attn_implementation": "flex_attention"},
}


@dataclass
class Arguments:
    """Run the recipes on one GPU."""

    measure: Literal["smoke", "speed"]
    case: str | None = None  # of speed, alone: a size and a way, as "size | way"
    seconds: float = 240.0  # for all cases of speed; those that begin later are left out
    results: str = "benchmarks/results/gpu"


def smoke(config: Path, precision: str, folder: Path) -> dict[str, Any]:
    """How a smoke config ends, after how long, and the losses of its steps."""
    script = config.parent.parent / f"{config.stem.split('_smoke')[0]}.py"
    words = [script, config, "--output_dir", folder, "--mixed_precision", precision]
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=300, check=False
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines() if run.returncode == 0 else []
    records = [record for record in map(json.loads, lines) if "loss" in record]
    return {
        "config": str(config),
        "mixed_precision": precision,
        "status": run.returncode,
        "seconds": time.monotonic() - start,
        "losses": [record["loss"] for record in records],
        "skipped": sum("skipped" in record for record in records),
        "error": "" if run.returncode == 0 else (run.stderr or run.stdout)[-2000:],
    }


def measure_smoke(arguments: Arguments) -> None:
    facts = describe("python -m benchmarks.gpu", PACKAGES)
    configs = sorted(Path("recipes").glob("*/configs/*_smoke.yaml"))
    with TemporaryDirectory() as folder, ThreadPoolExecutor(AT_A_TIME) as pool:
        runs = [
            pool.submit(smoke, config, precision, Path(folder, f"{index}-{precision}"))
            for index, config in enumerate(configs)
            for precision in PRECISIONS
        ]
        found = [run.result() for run in runs]
    reference = {run["config"]: run["losses"] for run in found if run["mixed_precision"] == "no"}
    rows = []
    for run in found:
        pairs = zip(run["losses"], reference[run["config"]], strict=False)
        distance = max((abs(a / b - 1) for a, b in pairs if a is not None), default=None)
        cells = [run["config"], run["mixed_precision"], run["status"], f"{run['seconds']:.0f}"]
        rows.append([*cells, run["skipped"], "" if distance is None else f"{distance:.2%}"])
        if run["error"]:
            print(f"{run['config']} {run['mixed_precision']}:\n{run['error']}", flush=True)
    header = ["config", "precision", "status", "seconds", "steps skipped", "loss beside fp32's"]
    text = markdown_table(header, rows, "llrrrr")
    text += f"\n\n{AT_A_TIME} runs at a time; the largest relative distance of a step's loss."
    write_results(f"{arguments.results}_smoke", text, facts, {"runs": found})


def prepared(size: str, way: str, folder: str) -> tuple[Training, float]:
    """A run of that size on the sample corpus, and its FLOPs a token."""
    is_bert = size.startswith("BERT")
    settings = SIZES[size] | WAYS[way]
    rows = settings["per_device_batch_size"]
    settings |= {"output_dir": folder, "global_batch_size": rows, "lanes": 8, "report_to": []}
    settings |= {"mixed_precision": "bf16", "max_steps": WARMUP + STEPS, "logging_steps": 1}
    kind = "wordpiece" if is_bert else "bpe"
    settings |= {"tokenizer": f"data/tokenizers/{kind}-8192", "dataloader_num_workers": 4}
    settings |= {"train_sources": [{"path": "data/sample/train-*.jsonl"}]}
    recipe = bert if is_bert else causal_lm
    words = [
        w for k, v in settings.items() for w in (f"--{k}", v if v == str(v) else json.dumps(v))
    ]
    args = parse(recipe.Arguments, words)
    tokenizer, length = load_tokenizer(args), args.sequence_length
    config = model_config(args, tokenizer)
    corpus = Corpus(args)
    training = Training(args, RunFolder(folder))
    if is_bert:
        kind, predicted = transformers.AutoModelForPreTraining, args.mlm_probability
        lanes = Lanes(corpus, SentenceEncoder(tokenizer))
        make = ExampleMaker(tokenizer, args)
        rows_of = partial(example_rows, lanes, make, [(length, 1)], args.packing)
        model = build_model(args, config, kind)
        objective = bert.MaskedLoss(model, args.objective, args.packing)
    else:
        kind, predicted = transformers.AutoModelForCausalLM, 1.0
        lanes = Lanes(corpus, DocumentEncoder(tokenizer))
        rows_of = partial(packed_rows, lanes, length)
        model = build_model(args, config, kind)
        objective = causal_lm.NextTokenLoss(model)
    training.prepare(objective, model, tokenizer, TrainingStream(lanes, rows_of, args))
    return training, flops_per_token(config, length, kind, predicted)


def measure_case(case: str) -> None:
    """Print what came out as JSON."""
    with TemporaryDirectory() as folder:
        training, flops = prepared(*case.split(" | "), folder)
        marks: list[tuple[float, int]] = []

        def observe(step: int, tokens: int) -> None:
            torch.cuda.synchronize()
            marks.append((time.perf_counter(), tokens))

        observe_recipe(training, WARMUP + STEPS, observe)
    pairs = zip(marks[WARMUP:], marks[WARMUP + 1 :], strict=False)
    rates = [(tokens - before) / (end - start) for (start, before), (end, tokens) in pairs]
    name, rate = torch.cuda.get_device_name(), statistics.median(rates)
    peak = next(peak for key, peak in PEAK_FLOPS.items() if key in name)
    found = {"tokens_per_second": rates, "flops_per_token": flops, "mfu": rate * flops / peak}
    found["gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps({"case": case, "seconds_to_warm": marks[WARMUP][0] - marks[0][0], **found}))


def measure_speed(arguments: Arguments) -> None:
    facts = describe("python -m benchmarks.gpu", PACKAGES)
    end, rows, found = time.monotonic() + arguments.seconds, [], []
    for size in SIZES:
        for way in WAYS:
            if time.monotonic() > end or (size.startswith("BERT") and "flex" in way):
                continue  # packed rows of encoders need sdpa or eager
            case = f"{size} | {way}"
            words = ["-m", "benchmarks.gpu", "--measure", "speed", "--case", case]
            run = subprocess.run(
                [sys.executable, *words], capture_output=True, text=True, check=False
            )
            if run.returncode:
                print(f"{case}:\n{run.stderr[-3000:]}", flush=True)
                rows.append([size, way, "failed", "", "", ""])
                found.append({"case": case, "error": run.stderr[-2000:]})
                continue
            one = json.loads(run.stdout.splitlines()[-1])
            found.append(one)
            rate, utilization = statistics.median(one["tokens_per_second"]), f"{one['mfu']:.1%}"
            warm = f"{one['seconds_to_warm']:.0f}"
            rows.append([size, way, f"{rate:,.0f}", utilization, f"{one['gib']:.1f}", warm])
            print(rows[-1], flush=True)
    header = ["model, micro-batch", "how", "tokens/s", "MFU", "peak GiB", f"s for {WARMUP} steps"]
    text = markdown_table(header, rows, "llrrrr")
    text += f"\n\nbf16 autocast, fused AdamW; medians of {STEPS} steps after {WARMUP}."
    write_results(f"{arguments.results}_speed", text, facts, {"cases": found})


def main() -> None:
    arguments = parse(Arguments)
    if not torch.cuda.is_available():
        raise InputError("there is no GPU here")
    if arguments.case:
        measure_case(arguments.case)
    else:
        {"smoke": measure_smoke, "speed": measure_speed}[arguments.measure](arguments)


if __name__ == "__main__":
    command(main)
