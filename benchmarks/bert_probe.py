"""Does pretraining teach the encoder something? Which package does a docstring come from?

    python -m benchmarks.bert_probe

For each seed the recipe pretrains an encoder (a finished run is not repeated); a logistic
regression then reads the package off its frozen, mean-pooled output, and off that of the encoder
as it was initialised. The names of the packages are taken out of the texts first. Results:
benchmarks/results/bert_probe.md and .json.
"""

import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    PreTrainedModel,
    logging,
)

from benchmarks.pretrain_bert import describe
from recipes.pretrain import bert
from utils.config import InputError, command, parse
from utils.model import build_model, load_tokenizer, model_config
from utils.randomness import keyed_permutation
from utils.sources import Source, held_out_documents

NOT_PACKAGES = ("Documentation", "StandardLibrary")
# long names inside of other words too (PyTorch, numpydoc), short ones where no letter is beside
NAMES = re.compile(
    r"(py)?torch|numpy|scipy|scikits?([-_ ]learn)?|sklearn|pandas|sympy|networkx|transformers"
    r"|hugging[-_ ]?face|(?<![a-z])(np|sp|pd|nx|hf)(?![a-z])",
    re.IGNORECASE,
)


@dataclass
class Arguments:
    """Probe encoders pretrained with several seeds, and the same encoders untrained."""

    config: str = "recipes/pretrain/configs/bert_demo.yaml"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    num_processes: int = 2  # that pretrain
    output_dir: str = "runs/bert_probe"  # of the runs: seed-0, seed-1, …
    sample: str = "data/sample"  # the folder of the labelled documents
    probe_documents: int = 2000  # all of validation.jsonl, and the rest drawn from train-*.jsonl
    max_length: int = 128  # tokens of a document that the encoder sees
    C: float = 1.0  # inverse strength of the probe's regularisation
    results: str = "benchmarks/results/bert_probe"


class Labelled(NamedTuple):
    texts: list[str]
    packages: list[str]


def read_labelled(pattern: str) -> Labelled:
    """The documents that belong to a package, without the names of packages."""
    source = Source(pattern, domain_field="meta.redpajama_set_name")
    documents = list(held_out_documents([source], None, "fail"))
    chosen = [document for document in documents if document.domain not in NOT_PACKAGES]
    texts = [NAMES.sub(" ", document.text) for document in chosen]
    return Labelled(texts, [document.domain for document in chosen])


def probe_documents(args: Arguments) -> Labelled:
    validation = read_labelled(f"{args.sample}/validation.jsonl")
    train = read_labelled(f"{args.sample}/train-*.jsonl")
    drawn = keyed_permutation(len(train.texts), "probe")
    drawn = drawn[: max(0, args.probe_documents - len(validation.texts))]
    return Labelled(*(a + [b[i] for i in drawn] for a, b in zip(validation, train, strict=True)))


def pretrain(args: Arguments, seed: int) -> Path:
    """Run the recipe, which knows what is finished; returns the folder of the export."""
    folder = Path(args.output_dir) / f"seed-{seed}"
    launch = [sys.executable]
    if args.num_processes > 1:
        config_file = "accelerate_configs/multi_cpu.yaml"
        launch += ["-m", "accelerate.commands.launch", "--config_file", config_file]
        launch += ["--num_processes", str(args.num_processes)]
    settings = ["--seed", str(seed), "--output_dir", str(folder)]
    run = subprocess.run([*launch, "recipes/pretrain/bert.py", args.config, *settings], check=False)
    if run.returncode or not (folder / "model").exists():
        raise InputError(f"the run in {folder} did not finish: start again, and it continues")
    return folder / "model"


def untrained(args: Arguments, seed: int) -> PreTrainedModel:
    """The encoder that the run of this seed began with."""
    recipe = parse(bert.Arguments, [args.config, "--seed", str(seed)])
    tokenizer = load_tokenizer(recipe)
    config = model_config(recipe, recipe.sequence_length, tokenizer)
    # weights are a function of the seed and the name of the module: the class must be the recipe's
    auto_model = AutoModelForMaskedLM if recipe.objective == "mlm" else AutoModelForPreTraining
    return build_model(recipe, config, auto_model, seed).base_model


@torch.no_grad()
def features(encoder: PreTrainedModel, tokenizer, texts: list[str], max_length: int) -> np.ndarray:
    """Means of the last hidden state over the tokens that are not padding: (texts, hidden)."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    encoder.eval().to(device)
    pooled = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(
            texts[start : start + 64],
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        ).to(device)
        hidden = encoder(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][:, :, None]
        pooled.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.cat(pooled).numpy()


def probe(
    args: Arguments, encoder: PreTrainedModel, tokenizer, train: Labelled, test: Labelled
) -> dict[str, float]:
    inputs = [features(encoder, tokenizer, part.texts, args.max_length) for part in (train, test)]
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=args.C, max_iter=5000))
    return scores(test, classifier.fit(inputs[0], train.packages).predict(inputs[1]))


def scores(test: Labelled, predicted: list[str]) -> dict[str, float]:
    return {
        "accuracy": float(accuracy_score(test.packages, predicted)),
        "macro_f1": float(f1_score(test.packages, predicted, average="macro", zero_division=0)),
    }


def main() -> None:
    args = parse(Arguments)
    logging.set_verbosity_error()  # that an encoder leaves the heads of its export aside
    if not args.seeds:
        raise InputError("seeds: give at least one")
    facts = describe("benchmarks.bert_probe", ("torch", "transformers", "scikit-learn"))
    train, test = probe_documents(args), read_labelled(f"{args.sample}/test.jsonl")
    ((majority, _),) = Counter(train.packages).most_common(1)
    facts |= {
        "config": args.config,
        "processes": args.num_processes,
        "documents": f"{len(train.texts)} to fit the probe, {len(test.texts)} to test it",
        "packages": dict(sorted(Counter(test.packages).items())),
    }
    found = {"majority": scores(test, [majority] * len(test.texts)), "pretrained": {}}
    found["untrained"] = {}
    for seed in args.seeds:
        folder = pretrain(args, seed)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoders = {"pretrained": AutoModel.from_pretrained(folder)}
        encoders["untrained"] = untrained(args, seed)
        for kind, encoder in encoders.items():
            found[kind][seed] = probe(args, encoder, tokenizer, train, test)
            print(f"seed {seed}, {kind}: {found[kind][seed]}", flush=True)
    write_results(args, majority, found, facts)


def write_results(args: Arguments, majority: str, found: dict, facts: dict) -> None:
    names = {"accuracy": "accuracy", "macro_f1": "macro F1"}
    lines = [
        "| seed | " + " | ".join(f"{x}, pretrained | untrained | margin" for x in names.values()),
        "| --- | " + " | ".join(["---: | ---: | ---:"] * len(names)),
    ]
    columns: dict[str, dict[str, list[float]]] = {}
    for name in names:
        kinds = {k: [x[name] for x in found[k].values()] for k in ("pretrained", "untrained")}
        margins = [a - b for a, b in zip(*kinds.values(), strict=True)]
        columns[name] = {**kinds, "margin": margins}
    for index, seed in enumerate(args.seeds):
        cells = [f"{values[index]:.1%}" for kinds in columns.values() for values in kinds.values()]
        lines.append(f"| {seed} | " + " | ".join(cells))
    means = [
        f"{statistics.fmean(values):.1%} ± {spread(values):.1%}"
        for kinds in columns.values()
        for values in kinds.values()
    ]
    lines.append("| mean ± standard deviation | " + " | ".join(means))
    lines = [f"{line} |" for line in lines]
    guess = found["majority"]
    lines += [
        "",
        f"Always {majority}, the package that is most frequent where the probe is fitted: accuracy "
        f"{guess['accuracy']:.1%}, macro F1 {guess['macro_f1']:.1%}. The probe is a logistic "
        f"regression (C = {args.C}) on the standardised mean of the last hidden states of the "
        f"first {args.max_length} tokens; the names of the packages were taken out of the texts. "
        "Some of the documents that fit it were seen in pretraining, without their labels; those "
        "that test it were not.",
    ]
    text = "\n".join(lines)
    print(f"\n{text}")
    described = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    Path(f"{args.results}.md").write_text(f"{text}\n\n{described}\n")
    result = {**facts, "scores": found, "columns": columns}
    Path(f"{args.results}.json").write_text(json.dumps(result, indent=1) + "\n")


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    command(main)
