"""What the sweeps find goes into tests/sweeps/results.json and docs/architectures.md.

In `make sweep` each test adds cells for its types; in `make test` the committed ones are read.
"""

import json
import os
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import pytest
import torch
import transformers

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
# kind: heading, and the columns in their order
KINDS = {
    "causal": (
        "Causal language models",
        [
            *("packed", "unpacked", "further losses", "initialisation", "export", "tokenizer"),
            *("adapter", "merged", "adapter of embeddings", "merged of embeddings", "distilled"),
        ],
    ),
    "masked": (
        "Masked language models",
        [
            *("packed", "unpacked", "pairs", "initialisation", "export", "tokenizer"),
            *("distilled", "hidden states", "attention", "relations"),
        ],
    ),
    "seq2seq": (
        "Encoder-decoders",
        ["loss", "predictions", "initialisation", "export", "tokenizer"],
    ),
    "classification": ("Classifiers", ["loss", "padding", "initialisation", "export", "tokenizer"]),
}
INTRODUCTION = """# Architectures

What you get: which models of transformers the recipes train, and why they refuse the others. What
it costs: a look into a table; `make sweep` makes them anew, on a CPU. Each type that
transformers maps to one of four kinds was made tiny, with random weights, and compared with what
transformers itself does with it:

- **packed**, **unpacked**, **loss**: the training loss is the model's own, of each document alone
  where they are packed, and of a padded batch elsewhere
- **further losses**: which a model adds to its own when its config asks for them
  (`output_router_logits`), and the recipe does
- **pairs**: next-sentence and sentence-order prediction beside the masked tokens
- **padding**: of models that see it, whatever the attention mask says: a prediction depends on what
  else is in its batch, here as in transformers
- **initialisation**: from scratch every tensor has the mean and the spread `from_config` gives it,
  as a function of the seed
- **export**: what was not changed leaves tensor by tensor as it came
- **tokenizer**: a client reads the exported folder's as the run did, and writes it to the byte; one
  that was trained by itself, which transformers reads as a class of the type's own for some
- **adapter**, **merged**: LoRA on all linear layers, or on the embeddings, alone and merged,
  gives when it is loaded what it gave in training
- **distilled**: the divergence from another model of the type is that of their logits
- **hidden states**, **attention**, **relations**: what an encoder learns of them; the first is that
  of the states which the models give, of the others that it can be learnt is all that was tried
- **predictions**: the code of the model card writes what the run wrote

"refused" is said by the recipe in these words, before a step is made. "not built" is said by
transformers of the tiny model, or of a config without settings. A column is empty where it does not
apply.

Made by `make sweep` with torch {torch} and transformers {transformers}, {date}.
"""


def read_results() -> dict[str, dict[str, dict[str, str]]]:
    """kind → type → column → what was found there."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


@pytest.fixture(scope="session")
def results() -> dict[str, dict[str, dict[str, str]]]:
    return read_results()


@pytest.fixture(scope="session")
def record() -> Iterator[Callable[..., None]]:
    """record(kind, model_type, column=what was found, …); written in `make sweep` alone."""
    found: dict[str, dict[str, dict[str, str]]] = {}

    def add(kind: str, model_type: str, **cells: str) -> None:
        found.setdefault(kind, {}).setdefault(model_type, {}).update(cells)

    yield add
    if "SWEEP" in os.environ and found:
        write(found)


def write(found: dict[str, dict[str, dict[str, str]]]) -> None:
    """Merge what was found into the results, and write the page from all of them."""
    results = read_results()
    for kind, types in found.items():
        for model_type, cells in types.items():
            results.setdefault(kind, {}).setdefault(model_type, {}).update(cells)
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    lines = [INTRODUCTION.format(**made_with, date=date.today())]
    for kind, (heading, columns) in KINDS.items():
        if kind not in results:
            continue
        lines += [f"## {heading}", "", *summary(results[kind], columns), ""]
        lines += ["| type | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for model_type, cells in sorted(results[kind].items()):
            row = [cells.get(column, "").replace("|", "\\|") for column in columns]
            lines.append(f"| {model_type} | " + " | ".join(row) + " |")
        lines.append("")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines))


def summary(types: dict[str, dict[str, str]], columns: list[str]) -> list[str]:
    """A line a column of comparisons: how many types are the same, refused, or not built."""
    lines = []
    for column in columns:
        cells = [cells.get(column, "") for cells in types.values()]
        same = sum(cell == "same" for cell in cells)
        if same:
            counts = [f"{same} of {len([*filter(None, cells)])} types are the same"]
            for what in ("unpacked: same", "refused", "not built"):
                number = sum(cell.startswith(what) for cell in cells)
                counts += [f"{number} {what}"] if number else []
            lines.append(f"- {column}: {', '.join(counts)}")
    return lines
