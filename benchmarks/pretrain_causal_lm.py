"""Training speed of the causal recipe beside a bare PyTorch loop and transformers.Trainer.

    python -m benchmarks.pretrain_causal_lm

The three train the same model on the same packed rows: the recipe reads them from its stream while
it trains, the others find them ready in memory. They take turns in one process. Results:
benchmarks/results/pretrain_causal_lm.md and .json.
"""

import itertools
import time
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from benchmarks.measurement import describe, median_and_range, ratios, write_results
from benchmarks.trainers import Observer, observe_recipe, observed, timed, trainer_settings
from packing import DocumentEncoder, packed_rows
from recipes.causal_lm import pretrain as causal_lm
from utils.config import command, parse
from utils.lanes import Corpus, Lanes
from utils.model import build_model, model_config
from utils.report import markdown_table
from utils.run_folder import RunFolder
from utils.stream import TrainingStream
from utils.training import Training

RECIPE = "this recipe, reading and tokenizing"
LOOP = "bare PyTorch loop, rows in memory"
TRAINER = "transformers.Trainer, rows in memory"
WARMUP = 2  # steps of a turn that are not timed


@dataclass
class Arguments:
    """Measure the recipe beside a bare loop and transformers.Trainer."""

    config: str = "recipes/causal_lm/configs/pretrain_demo.yaml"
    steps: int = 6  # of a turn, after two that are not timed
    turns: int = 5
    results: str = "benchmarks/results/pretrain_causal_lm"


def build(args: causal_lm.Arguments, tokenizer) -> torch.nn.Module:
    config = model_config(args, tokenizer)
    return build_model(args, config, AutoModelForCausalLM)


def stream_of(args: causal_lm.Arguments, tokenizer) -> TrainingStream:
    lanes = Lanes(Corpus(args), DocumentEncoder(tokenizer))
    return TrainingStream(lanes, partial(packed_rows, lanes, args.sequence_length), args)


def recipe_turn(args: causal_lm.Arguments, tokenizer) -> float:
    """Tokens per second of the recipe itself, reading and tokenizing included."""

    def train(observe: Observer) -> None:
        with TemporaryDirectory() as folder:
            args.output_dir = folder
            training = Training(args, RunFolder(folder))
            model = build(args, tokenizer)
            data = stream_of(args, tokenizer)
            training.prepare(causal_lm.NextTokenLoss(model), model, tokenizer, data)
            observe_recipe(training, args.max_steps, observe)

    found = timed(train, WARMUP, args.max_steps)
    return found["tokens"] / found["seconds"]


def batches_of(args: causal_lm.Arguments, tokenizer) -> list[list[dict[str, torch.Tensor]]]:
    """The micro-batches of each step."""
    steps = stream_of(args, tokenizer).steps(rank=0, world_size=1, step=0, states={})
    return [step.batches for step in itertools.islice(steps, args.max_steps)]


def bare_turn(args: causal_lm.Arguments, tokenizer, steps) -> float:
    """Tokens per second of the loop that one writes by hand, with the whole logits."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = build(args, tokenizer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, args.mixed_precision == "bf16")
    model.train()
    for step, batches in enumerate(steps, 1):
        targets = sum(int((b["shift_labels"] != -100).sum()) for b in batches)
        for batch in batches:
            batch = {k: v.to(device) for k, v in batch.items()}
            with autocast:
                logits = model(
                    input_ids=batch["input_ids"],
                    position_ids=batch["position_ids"],
                    use_cache=False,
                ).logits
            labels = batch["shift_labels"].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum") / targets
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        if step == WARMUP:
            start = time.perf_counter()
    tokens = (len(steps) - WARMUP) * args.global_batch_size * args.sequence_length
    return tokens / (time.perf_counter() - start)


def trainer_turn(args: causal_lm.Arguments, tokenizer, steps) -> float:
    """Tokens per second of transformers.Trainer on the rows in memory."""
    rows = [
        {"labels": row["shift_labels"], **row}
        for batches in steps
        for batch in batches
        for row in (dict(zip(batch, t, strict=True)) for t in zip(*batch.values(), strict=True))
    ]

    def train(observe: Observer) -> None:
        with TemporaryDirectory() as folder:
            observed(Trainer, observe)(
                build(args, tokenizer),
                TrainingArguments(
                    folder,
                    bf16=args.mixed_precision == "bf16",
                    train_sampling_strategy="sequential",
                    remove_unused_columns=False,
                    **trainer_settings(args, len(steps)),
                ),
                train_dataset=rows,
            ).train()

    found = timed(train, WARMUP, len(steps))
    return found["tokens"] / found["seconds"]


def main() -> None:
    arguments = parse(Arguments)
    packages = ("torch", "transformers", "accelerate", "tokenizers")
    facts = describe("python -m benchmarks.pretrain_causal_lm", packages)
    facts |= {"threads": torch.get_num_threads(), "config": arguments.config}
    facts |= {"steps": arguments.steps, "turns": arguments.turns}
    args = parse(causal_lm.Arguments, [arguments.config])
    args.max_steps, args.logging_steps = arguments.steps + WARMUP, 10**9
    args.lr_scheduler_type, args.warmup_steps, args.report_to = "constant", 0, []
    args.lr_scheduler_kwargs = {}
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    steps = batches_of(args, tokenizer)
    peers = {
        RECIPE: lambda: recipe_turn(args, tokenizer),
        LOOP: lambda: bare_turn(args, tokenizer, steps),
        TRAINER: lambda: trainer_turn(args, tokenizer, steps),
    }
    speeds: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(arguments.turns):
        for name, measure in peers.items():
            speeds[name].append(measure())
            print(f"turn {turn + 1}: {name}: {speeds[name][-1]:,.0f} tokens/s", flush=True)
    of_loop = {name: ratios(values, speeds[LOOP]) for name, values in speeds.items()}
    rows = [
        [name, median_and_range(speeds[name], ",.0f"), median_and_range(of_loop[name], ".1%")]
        for name in peers
    ]
    text = markdown_table(["", "tokens/s", "of the bare loop"], rows, "lrr")
    text += f"\n\nMedians (least to most) of {arguments.turns} turns; ratios are of one turn."
    measured = {"tokens_per_second": speeds, "of_the_bare_loop": of_loop}
    write_results(arguments.results, text, facts, measured)


if __name__ == "__main__":
    command(main)
