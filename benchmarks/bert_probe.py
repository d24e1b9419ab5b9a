"""Does pretraining teach the encoder something? Which package does a docstring come from?

    python -m benchmarks.bert_probe

For each seed the recipe pretrains an encoder (a finished run is not repeated); a logistic
regression then reads the package off its frozen, mean-pooled output, and off that of the encoder
as it was initialised. The names of the packages are taken out of the texts first. Results:
benchmarks/results/bert_probe.md and .json.
"""

import re
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
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

from benchmarks.measurement import describe, write_results
from recipes.bert import pretrain as bert
from utils.config import InputError, command, parse
from utils.model import build_model, load_tokenizer, model_config
from utils.randomness import keyed_permutation
from utils.report import markdown_table
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

    config: str = "recipes/bert/configs/pretrain_demo.yaml"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    num_processes: int = 2  # that pretrain
    output_dir: str = "runs/bert_probe"  # of the runs: seed-0, seed-1, …
    sample: str = "data/sample"  # the folder of the labelled documents
    # labelled documents that fit the probe, drawn from train-*.jsonl; it is tested on those of
    # validation.jsonl and test.jsonl, which no run has seen
    probe_documents: list[int] = field(default_factory=lambda: [250, 1000, 4000])
    max_length: int = 128  # tokens of a document that the encoder sees
    C: float = 1.0  # inverse strength of the probe's regularisation
    results: str = "benchmarks/results/bert_probe"


class Labelled(NamedTuple):
    texts: list[str]
    packages: list[str]


def read_labelled(pattern: str) -> Labelled:
    """The documents that belong to a package, without the names of packages."""
    source = Source(pattern, domain_field="meta.redpajama_set_name")
    documents = list(held_out_documents([source], None))
    chosen = [document for document in documents if document.domain not in NOT_PACKAGES]
    texts = [NAMES.sub(" ", document.text) for document in chosen]
    return Labelled(texts, [document.domain for document in chosen])


def split(args: Arguments) -> tuple[Labelled, Labelled]:
    """The documents that fit the probe, in a random order, and those that test it."""
    train = read_labelled(f"{args.sample}/train-*.jsonl")
    drawn = keyed_permutation(len(train.texts), "probe")[: max(args.probe_documents)]
    held_out = [read_labelled(f"{args.sample}/{name}.jsonl") for name in ("validation", "test")]
    return (
        Labelled(*([part[i] for i in drawn] for part in train)),
        Labelled(*(a + b for a, b in zip(*held_out, strict=True))),
    )


def pretrain(args: Arguments, seed: int) -> Path:
    """Run the recipe, which knows what is finished; returns the folder of the export."""
    folder = Path(args.output_dir) / f"seed-{seed}"
    launch = [sys.executable]
    if args.num_processes > 1:
        config_file = "accelerate_configs/multi_cpu.yaml"
        launch += ["-m", "accelerate.commands.launch", "--config_file", config_file]
        launch += ["--num_processes", str(args.num_processes)]
    settings = ["--seed", str(seed), "--output_dir", str(folder)]
    run = subprocess.run([*launch, "recipes/bert/pretrain.py", args.config, *settings], check=False)
    if run.returncode or not (folder / "model").exists():
        raise InputError(f"the run in {folder} did not finish: start again, and it continues")
    return folder / "model"


def untrained(args: Arguments, seed: int) -> PreTrainedModel:
    """The encoder that the run of this seed began with."""
    recipe = parse(bert.Arguments, [args.config, "--seed", str(seed)])
    tokenizer = load_tokenizer(recipe)
    config = model_config(recipe, tokenizer)
    # weights are a function of the seed and the name of the module: the class must be the recipe's
    auto_model = AutoModelForMaskedLM if recipe.objective == "mlm" else AutoModelForPreTraining
    return build_model(replace(recipe, seed=seed), config, auto_model).base_model


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
) -> dict[int, dict[str, float]]:
    """The scores of the probe by the number of documents that fit it."""
    fitted, tested = (features(encoder, tokenizer, x.texts, args.max_length) for x in (train, test))
    found = {}
    for count in args.probe_documents:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=args.C, max_iter=5000))
        classifier.fit(fitted[:count], train.packages[:count])
        found[count] = scores(test.packages, classifier.predict(tested))
    return found


def scores(packages: list[str], predicted: list[str]) -> dict[str, float]:
    return {
        "accuracy": float(accuracy_score(packages, predicted)),
        "macro F1": float(f1_score(packages, predicted, average="macro", zero_division=0)),
    }


def main() -> None:
    args = parse(Arguments)
    logging.set_verbosity_error()  # that an encoder leaves the heads of its export aside
    if not args.seeds or not args.probe_documents:
        raise InputError("seeds and probe_documents: give at least one of each")
    facts = describe("python -m benchmarks.bert_probe", ("torch", "transformers", "scikit-learn"))
    train, test = split(args)
    ((majority, _),) = Counter(train.packages).most_common(1)
    facts |= {
        "config": args.config,
        "processes": args.num_processes,
        "documents that test the probe": len(test.texts),
        "their packages": dict(sorted(Counter(test.packages).items())),
    }
    found: dict[str, dict] = {"pretrained": {}, "untrained": {}}
    for seed in args.seeds:
        folder = pretrain(args, seed)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoders = {"pretrained": AutoModel.from_pretrained(folder)}
        encoders["untrained"] = untrained(args, seed)
        for kind, encoder in encoders.items():
            found[kind][seed] = probe(args, encoder, tokenizer, train, test)
            print(f"seed {seed}, {kind}: {found[kind][seed]}", flush=True)
    guess = scores(test.packages, [majority] * len(test.packages))
    text = as_table(args, majority, guess, found)
    write_results(args.results, text, facts, {"majority": guess, "scores": found})


def as_table(args: Arguments, majority: str, guess: dict, found: dict[str, dict]) -> str:
    header = ["labelled documents", "score", "pretrained", "untrained", "margin"]
    rows = []
    for count in args.probe_documents:
        for name in guess:
            kinds = [[x[count][name] for x in of_seed.values()] for of_seed in found.values()]
            margins = [a - b for a, b in zip(*kinds, strict=True)]
            cells = [f"{statistics.fmean(x):.1%} ± {spread(x):.1%}" for x in (*kinds, margins)]
            each = ", ".join(f"{margin:.1%}" for margin in margins)
            rows.append([count, name, *cells, each])
    seeds = ", ".join(map(str, args.seeds))
    lines = [
        markdown_table([*header, "margin of each seed"], rows, "rlrrrl"),
        "",
        f"Mean ± standard deviation over the seeds {seeds}. Always {majority}, the most frequent "
        f"package: accuracy {guess['accuracy']:.1%}, macro F1 {guess['macro F1']:.1%}. The probe "
        f"is a logistic regression (C = {args.C}) on the standardised mean of the last hidden "
        f"states of the first {args.max_length} tokens; the names of the packages were taken out "
        "of the texts. Some of the documents that fit it were seen in pretraining, without their "
        "labels; those that test it were not.",
    ]
    return "\n".join(lines)


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    command(main)
