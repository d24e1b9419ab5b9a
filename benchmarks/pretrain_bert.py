"""Speed and memory of the BERT recipe beside transformers.Trainer, on the same text.

    python -m benchmarks.pretrain_bert

All predict masked tokens with the same model and optimizer, and take the same number of rows a
step and a micro-batch. The recipe reads, tokenizes, masks and packs while it trains; for Trainer,
whose collator masks and pads, the text is tokenized beforehand. What counts is useful tokens: not
padding. The peers take turns in one process; the peak of their memory is measured in a fresh
process each. Results: benchmarks/results/pretrain_bert.md and .json.
"""

import statistics
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from benchmarks.measurement import describe, median_and_range, ratios, write_results
from benchmarks.trainers import (
    Observer,
    by_turns,
    in_a_fresh_process,
    observe_recipe,
    observed,
    peak_memory,
    timed,
    trainer_settings,
)
from example_rows import example_rows
from masking import ExampleMaker
from recipes.bert import pretrain as bert
from sentence_encoder import SentenceEncoder
from utils.config import command, parse
from utils.lanes import Corpus, Lanes
from utils.model import build_model, load_tokenizer, model_config
from utils.randomness import keyed_permutation
from utils.report import markdown_table
from utils.run_folder import RunFolder
from utils.sources import Source, held_out_documents
from utils.stream import TrainingStream
from utils.training import Training

RECIPE = "this recipe, reading and tokenizing"
PADDED = "Trainer, documents padded to the longest"
BLOCKS = "Trainer, concatenated blocks"
GOALS = {PADDED: {"speed": 2.0, "memory": 0.6}, BLOCKS: {"speed": 1.15}}
WARMUP = 2  # steps of a turn that are not timed
MEMORY_STEPS = 4
MEBIBYTE = 2**20


@dataclass
class Arguments:
    """Measure the BERT recipe beside transformers.Trainer with padding and with blocks."""

    model: dict[str, Any] = field(
        default_factory=lambda: {
            "model_type": "bert",
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "vocab_size": 30522,  # BERT's own: what is read fills a part of it
        }
    )
    tokenizer: str = "data/tokenizers/wordpiece-8192"
    train_path: str = "data/sample/train-*.jsonl"
    sequence_length: int = 512
    global_batch_size: int = 16  # rows a step
    per_device_batch_size: int = 8  # rows a micro-batch
    steps: int = 4  # of a turn, after two that are not timed
    turns: int = 5
    results: str = "benchmarks/results/pretrain_bert"

    def recipe(self, seed: int) -> bert.Arguments:
        return bert.Arguments(
            seed=seed,
            model=self.model,
            tokenizer=self.tokenizer,
            train_sources=[Source(self.train_path)],
            objective="mlm",
            sequence_length=self.sequence_length,
            global_batch_size=self.global_batch_size,
            per_device_batch_size=self.per_device_batch_size,
            # a lane tokenizes dozens of rows at once: with many lanes, before the clock starts
            lanes=1,
            lr_scheduler_type="constant",
            learning_rate=1e-4,
            logging_steps=10**9,
            report_to=[],
        )


def build(args: bert.Arguments, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    config = model_config(args, tokenizer)
    return build_model(args, config, AutoModelForMaskedLM)


def train_recipe(args: bert.Arguments, steps: int, observe: Observer) -> None:
    tokenizer = load_tokenizer(args)
    lanes = Lanes(Corpus(args), SentenceEncoder(tokenizer))
    make_examples = ExampleMaker(tokenizer, args)
    phases = [(args.sequence_length, 1)]  # the last one goes on
    with TemporaryDirectory() as folder:
        args.output_dir = folder
        training = Training(args, RunFolder(folder))
        model = build(args, tokenizer)
        objective = bert.MaskedLoss(model, args.objective, args.packing)
        rows_of = partial(example_rows, lanes, make_examples, phases, args.packing)
        training.prepare(objective, model, tokenizer, TrainingStream(lanes, rows_of, args))
        observe_recipe(training, steps, observe)


def train_padded(args: bert.Arguments, steps: int, observe: Observer) -> None:
    """Whole documents, cut to the length; a micro-batch is padded to its longest."""
    tokenizer = load_tokenizer(args)
    cut = {"truncation": True, "max_length": args.sequence_length}
    rows = [encoded(tokenizer, text, **cut) for text in texts(args, steps)]
    train_trainer(args, tokenizer, rows, steps, observe)


def train_blocks(args: bert.Arguments, steps: int, observe: Observer) -> None:
    """Documents one after the other, cut into full rows (`group_texts` of run_mlm.py)."""
    tokenizer, length = load_tokenizer(args), args.sequence_length
    documents = [encoded(tokenizer, text) for text in texts(args, steps)]
    joined = {name: [*chain(*(d[name] for d in documents))] for name in documents[0]}
    total = len(joined["input_ids"]) // length * length
    rows = [
        {name: values[start : start + length] for name, values in joined.items()}
        for start in range(0, total, length)
    ]
    train_trainer(args, tokenizer, rows, steps, observe)


def texts(args: bert.Arguments, steps: int) -> list[str]:
    """Documents drawn from the corpus: twice the rows that are needed, which may be shorter."""
    everything = [document.text for document in held_out_documents(args.train_sources, None)]
    order = keyed_permutation(len(everything), args.seed, "benchmark")
    return [everything[i] for i in islice(order, 2 * steps * args.global_batch_size)]


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> dict[str, list[int]]:
    return dict(
        tokenizer(
            text,
            return_special_tokens_mask=True,
            return_token_type_ids=False,
            verbose=False,
            **options,
        )
    )


def train_trainer(
    args: bert.Arguments,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    steps: int,
    observe: Observer,
) -> None:
    with TemporaryDirectory() as folder:
        observed(Trainer, observe)(
            build(args, tokenizer),
            TrainingArguments(
                folder,
                remove_unused_columns=False,  # the collator asks for special_tokens_mask
                **trainer_settings(args, steps),
            ),
            data_collator=DataCollatorForLanguageModeling(
                tokenizer, mlm_probability=args.mlm_probability
            ),
            train_dataset=rows,
        ).train()


PEERS = {RECIPE: train_recipe, PADDED: train_padded, BLOCKS: train_blocks}


def measure_speed(arguments: Arguments, name: str, seed: int) -> dict[str, float]:
    last = WARMUP + arguments.steps
    return timed(partial(PEERS[name], arguments.recipe(seed), last), WARMUP, last)


def measure_memory(arguments: Arguments, name: str) -> int:
    return peak_memory(partial(PEERS[name], arguments.recipe(0), MEMORY_STEPS), MEMORY_STEPS)


def main() -> None:
    arguments = parse(Arguments)
    packages = ("torch", "transformers", "accelerate", "tokenizers")
    facts = describe("python -m benchmarks.pretrain_bert", packages)
    settings = ("model", "sequence_length", "global_batch_size", "per_device_batch_size")
    facts |= {"threads": torch.get_num_threads()}
    facts |= {name: getattr(arguments, name) for name in (*settings, "steps", "turns")}
    memory = {}
    for name in PEERS:
        memory[name] = in_a_fresh_process(measure_memory, arguments, name)
        print(f"{name}: {memory[name] / MEBIBYTE:,.0f} MiB", flush=True)
    turns, rates = by_turns(PEERS, arguments.turns, partial(measure_speed, arguments))
    found = {
        name: {"speed": ratios(rates[RECIPE], rates[name]), "memory": memory[RECIPE] / memory[name]}
        for name in PEERS
    }
    text = as_table(arguments, turns, rates, memory, found)
    measured = {"turn": turns, "peak_memory_bytes": memory, "ratios": found}
    write_results(arguments.results, text, facts, measured)


def as_table(
    arguments: Arguments,
    turns: dict[str, list[dict[str, float]]],
    rates: dict[str, list[float]],
    memory: dict[str, int],
    found: dict[str, dict[str, Any]],
) -> str:
    slots = arguments.steps * arguments.global_batch_size * arguments.sequence_length
    header = ["", "useful tokens/s", "useful tokens of a row", "peak memory"]
    header += ["speed of the recipe", "memory of the recipe"]
    rows = []
    for name in PEERS:
        useful = sum(turn["tokens"] for turn in turns[name]) / len(turns[name]) / slots
        cells = [
            name,
            median_and_range(rates[name], ",.0f"),
            f"{useful * arguments.sequence_length:.0f} of {arguments.sequence_length}",
            f"{memory[name] / MEBIBYTE:,.0f} MiB",
            median_and_range(found[name]["speed"], ".2f"),
            f"{found[name]['memory']:.2f}",
        ]
        rows.append(cells)
    lines = [
        markdown_table(header, rows, "lrrrrr"),
        "",
        f"Medians (least to most) of {arguments.turns} turns. The last columns are ratios to the "
        f"row's peer, taken turn by turn. Peak memory is what {MEMORY_STEPS} steps in a fresh "
        "process added to that of before the first step: gradients, optimizer and activations, and "
        "not weights, imports and data. In the recipe's it includes what reading and tokenizing "
        "need.",
        "",
    ]
    for peer, goals in GOALS.items():
        reached = {**found[peer], "speed": statistics.median(found[peer]["speed"])}
        for measure, goal in goals.items():
            lines.append(
                f"- {measure} of the recipe, {peer}: {reached[measure]:.2f} x; goal: at "
                f"{'least' if measure == 'speed' else 'most'} {goal}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    command(main)
