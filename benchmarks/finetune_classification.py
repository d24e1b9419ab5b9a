"""The classification recipe: its speed beside transformers.Trainer, and what it makes of a model.

    python -m benchmarks.finetune_classification --measure speed
    python -m benchmarks.finetune_classification --measure quality

Speed: both fine-tune the same encoder on the same tokenized texts, the same number of texts a
step; Trainer pads each batch to its longest (DataCollatorWithPadding). What counts is useful
tokens: not padding. The two take turns in one process.

Quality: the recipe on the config of the demo (which package does a docstring come from?), for each
seed from the pretrained encoder, all of it and LoRA, and from the same encoder at random. A
finished run is not repeated. The settings were chosen on the validation data; the results are of
the test data, which are read once, at the end of a run.

Both need the export of `recipes/bert/configs/pretrain_demo.yaml`. Results:
benchmarks/results/finetune_classification.md, finetune_classification_quality.md and .json.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from benchmarks.measurement import describe, median_and_range, ratios, write_results
from benchmarks.trainers import Observer, observe_recipe, observed, timed, trainer_settings
from classification_examples import (
    TrainingExamples,
    check_tokenizer,
    collate,
    configure,
    labelled_examples,
)
from classification_loss import ClassificationLoss
from labelled_texts import label_ids, label_names, read_labelled_texts
from recipes.classification import finetune as classification
from utils.config import InputError, command, parse
from utils.epochs import Epochs, Mixture
from utils.model import build_model, load_tokenizer, model_config
from utils.report import markdown_table
from utils.run_folder import RunFolder
from utils.training import Training

RECIPE, TRAINER = "this recipe", "Trainer with DataCollatorWithPadding"
GOAL = 1.3
WARMUP = 3  # steps of a turn that are not timed
PRETRAINED, LORA, UNTRAINED = "pretrained", "pretrained, LoRA", "random initialisation"


@dataclass
class Arguments:
    """Measure the speed of the classification recipe, or what it makes of a model."""

    measure: Literal["speed", "quality"] = "speed"
    config: str = "recipes/classification/configs/finetune_demo.yaml"
    model_name_or_path: str | None = None  # null: that of the config
    # speed
    sequence_lengths: list[int] = field(default_factory=lambda: [128, 256])
    steps: int = 30  # of a turn, after three that are not timed
    turns: int = 5
    # quality
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    # of the recipe, for LoRA. Two thirds of the model are its word embeddings: they have most
    # of the ranks, and a small factor, since peft draws their second matrix with unit variance
    lora: dict[str, Any] = field(
        default_factory=lambda: {
            "lora": {
                "r": 1,
                "lora_alpha": 1,
                "rank_pattern": {"word_embeddings": 3},
                "alpha_pattern": {"word_embeddings": 0.6},
                "target_modules": ["word_embeddings", "query", "value", "dense"],
            },
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.05,
            "adam_beta2": 0.98,
        }
    )
    runs: str = "runs/finetune_classification"
    results: str = "benchmarks/results/finetune_classification"  # quality: …_quality

    def recipe(self, *settings: str) -> classification.Arguments:
        args = parse(classification.Arguments, [self.config, "--report_to", "[]", *settings])
        args.model_name_or_path = self.model_name_or_path or args.model_name_or_path
        if not Path(args.model_name_or_path, "config.json").exists():
            raise InputError(
                f"no model in {args.model_name_or_path}: run "
                "`python recipes/bert/pretrain.py recipes/bert/configs/pretrain_demo.yaml`"
            )
        return args


def prepare(args: classification.Arguments) -> tuple[Any, Any, list[dict[str, Any]]]:
    """(tokenizer, configuration, examples of the training data), the same for both."""
    rows = read_labelled_texts({"train": args.train_data}, args)["train"]
    names = label_names(rows, args)
    tokenizer = load_tokenizer(args)
    config = model_config(args, tokenizer)
    check_tokenizer(tokenizer, config, args.sequence_length)
    configure(config, names, args.problem_type, args.dropout)
    examples, _ = labelled_examples(tokenizer, rows, label_ids(rows, names, args))
    return tokenizer, config, examples


def train_recipe(args: classification.Arguments, prepared: tuple, observe: Observer) -> None:
    tokenizer, config, examples = prepared
    model = build_model(args, config, AutoModelForSequenceClassification)
    with TemporaryDirectory() as folder:
        args.output_dir = folder
        args = args.for_examples(len(examples))
        training = Training(args, RunFolder(folder))
        make = TrainingExamples(examples, tokenizer, None, None, args.seed)
        to_batch = partial(collate, pad_token_id=tokenizer.pad_token_id, label=0)
        objective = ClassificationLoss(model, args.problem_type)
        data = Epochs(Mixture(examples, args), to_batch, {"the training data": ""}, args, vary=make)
        training.prepare(objective, model, tokenizer, data)
        observe_recipe(training, args.max_steps, observe)


def train_trainer(args: classification.Arguments, prepared: tuple, observe: Observer) -> None:
    tokenizer, config, examples = prepared
    model = build_model(args, config, AutoModelForSequenceClassification)
    rows = [{n: e[n].tolist() for n in ("input_ids", "label")} for e in examples]
    with TemporaryDirectory() as folder:
        observed(Trainer, observe)(
            model,
            TrainingArguments(folder, **trainer_settings(args, args.max_steps)),
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=rows,
        ).train()


PEERS = {RECIPE: train_recipe, TRAINER: train_trainer}


def of_turn(arguments: Arguments, length: int, seed: int) -> classification.Arguments:
    settings = {
        "seed": seed,
        "sequence_length": length,
        "max_steps": WARMUP + arguments.steps,
        "logging_steps": 10**9,
        "load_best_model_at_end": False,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", json.dumps(value))]
    return arguments.recipe(*words)


def turn(name: str, args: classification.Arguments, prepared: tuple) -> float:
    """Useful tokens per second."""
    found = timed(partial(PEERS[name], args, prepared), WARMUP, args.max_steps)
    return found["tokens"] / found["seconds"]


def measure_speed(arguments: Arguments, facts: dict[str, Any]) -> None:
    rates: dict[int, dict[str, list[float]]] = {}
    for length in arguments.sequence_lengths:
        rates[length] = {name: [] for name in PEERS}
        prepared = prepare(of_turn(arguments, length, 0))
        for seed in range(arguments.turns):
            # who comes first changes, too
            for name in list(PEERS)[:: 1 if seed % 2 else -1]:
                rates[length][name].append(turn(name, of_turn(arguments, length, seed), prepared))
                rate = rates[length][name][-1]
                print(f"{length} tokens, turn {seed + 1}: {name}: {rate:,.0f}/s", flush=True)
    header = ["sequence_length", *(f"{name}, useful tokens/s" for name in PEERS)]
    rows, found = [], {}
    for length, of_length in rates.items():
        found[length] = ratios(of_length[RECIPE], of_length[TRAINER])
        cells = [median_and_range(of_length[name], ",.0f") for name in PEERS]
        cells.append(median_and_range(found[length], ".2f"))
        rows.append([str(length), *cells])
    lines = [
        markdown_table([*header, "speed of the recipe"], rows, "rrrr"),
        "",
        f"Medians (least to most) of {arguments.turns} turns of {arguments.steps} steps. The last "
        "column is the ratio to Trainer, taken turn by turn; goal, at the longest sequence_length: "
        f"at least {GOAL}; reached: {statistics.median(found[max(found)]):.2f}.",
    ]
    write_results(arguments.results, "\n".join(lines), facts, {"rates": rates, "ratios": found})


def fine_tune(arguments: Arguments, kind: str, seed: int) -> dict[str, Any]:
    """The test results of a run, and what of the model was trained."""
    args = arguments.recipe()
    folder = Path(arguments.runs, f"{kind.replace(', ', '-').replace(' ', '-')}-{seed}")
    settings = {"seed": seed, "output_dir": str(folder), "report_to": []}
    if kind == UNTRAINED:
        config = AutoConfig.from_pretrained(args.model_name_or_path)
        shape = {k: v for k, v in config.to_diff_dict().items() if k not in NOT_OF_A_SHAPE}
        settings |= {"tokenizer": args.model_name_or_path, "model_name_or_path": None}
        settings["model"] = shape | {"model_type": config.model_type}
    else:
        settings["model_name_or_path"] = args.model_name_or_path
    if kind == LORA:
        settings |= arguments.lora
    words = [
        word
        for key, value in settings.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]
    script = [sys.executable, "recipes/classification/finetune.py", arguments.config, *words]
    if subprocess.run(script, check=False).returncode:
        raise InputError(f"the run in {folder} did not finish: start again, and it continues")
    records = RunFolder(str(folder)).records()
    card = (folder / "README.md").read_text().splitlines()
    trained = next(line for line in card if line.startswith("| trained |"))
    tested = next(record for record in reversed(records) if "test_accuracy" in record)
    return {**tested, "trained": trained.split("|")[2].strip()}


# what the configuration of an export tells besides the shape of the model
NOT_OF_A_SHAPE = ("architectures", "dtype", "transformers_version", "_name_or_path")


def measure_quality(arguments: Arguments, facts: dict[str, Any]) -> None:
    kinds = (PRETRAINED, LORA, UNTRAINED)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for seed in arguments.seeds:
        for kind in kinds:
            found[kind].append(fine_tune(arguments, kind, seed))
            print(f"seed {seed}, {kind}: {found[kind][-1]['test_accuracy']:.1%}", flush=True)
    header = ["", "trained", "test accuracy", "test macro F1", "accuracy of each seed"]
    rows = []
    for kind, runs in found.items():
        scores = [[run[f"test_{name}"] for run in runs] for name in ("accuracy", "f1_macro")]
        each = ", ".join(f"{score:.1%}" for score in scores[0])
        cells = [f"{statistics.fmean(score):.1%} ± {spread(score):.1%}" for score in scores]
        rows.append([kind, runs[0]["trained"], *cells, each])
    accuracies = {kind: [run["test_accuracy"] for run in runs] for kind, runs in found.items()}
    margins = {
        kind: [a - b for a, b in zip(accuracies[PRETRAINED], accuracies[kind], strict=True)]
        for kind in (UNTRAINED, LORA)
    }
    lines = [
        markdown_table(header, rows, "llrrl"),
        "",
        f"Mean ± standard deviation over the seeds {', '.join(map(str, arguments.seeds))}. "
        f"Pretrained above random initialisation: {points(margins[UNTRAINED])} (goal: above, with "
        f"each seed). All weights above LoRA: {points(margins[LORA])} (goal: at most 2).",
    ]
    facts |= {"lora": arguments.lora}
    write_results(f"{arguments.results}_quality", "\n".join(lines), facts, {"runs": found})


def points(margins: list[float]) -> str:
    each = ", ".join(f"{100 * margin:.1f}" for margin in margins)
    return f"{100 * statistics.fmean(margins):.1f} points ({each})"


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    arguments = parse(Arguments)
    packages = ("torch", "transformers", "accelerate", "peft")
    facts = describe("python -m benchmarks.finetune_classification", packages)
    facts |= {"config": arguments.config, "threads": torch.get_num_threads()}
    {"speed": measure_speed, "quality": measure_quality}[arguments.measure](arguments, facts)


if __name__ == "__main__":
    command(main)
