"""Speed of the instruction recipe beside trl's SFTTrainer, on conversations of natural lengths.

    pip install trl==1.16.0
    python -m benchmarks.finetune_instruction

All train the same model with the same optimizer on the same conversations, tokenized before the
clock starts, the loss on the answers alone, with as many conversations a step (a packed step of
trl holds more) and at most as many tokens a micro-batch. What counts is useful tokens: not padding.
The peers take turns in one process. Results: benchmarks/results/finetune_instruction.md and .json.
"""

import copy
import statistics
from dataclasses import dataclass, field
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM

from benchmarks.measurement import describe, median_and_range, ratios, write_results
from benchmarks.trainers import (
    Observer,
    by_turns,
    observe_recipe,
    observed,
    timed,
    trainer_settings,
)
from conversations import collate, set_chat_template, to_examples
from recipes.causal_lm import finetune as instruction
from utils.config import InputError, command, parse
from utils.epochs import Epochs, Mixture
from utils.model import build_model, load_tokenizer, model_config
from utils.report import markdown_table
from utils.run_folder import RunFolder
from utils.tables import Table, read_table
from utils.training import Training

PADDED, PACKED = "this recipe, sorted and padded", "this recipe, packed"
TRL_PADDED, TRL_PACKED = "SFTTrainer, padded (its default)", "SFTTrainer, packed (bfd)"
GOALS = {TRL_PADDED: 1.5, TRL_PACKED: 1.0}
WARMUP = 2  # steps of a turn that are not timed


@dataclass
class Arguments:
    """Measure the instruction recipe beside trl's SFTTrainer."""

    model: dict[str, Any] = field(
        default_factory=lambda: {
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        }
    )
    tokenizer: str = "data/tokenizers/bpe-8192"
    chat_template: str = "plain"
    train_path: str = "data/tasks/instruction/train.jsonl"
    sequence_length: int = 1024
    global_batch_size: int = 32  # conversations a step
    per_device_batch_size: int = 8  # conversations of sequence_length that make a micro-batch
    steps: int = 6  # of a turn, after two that are not timed
    turns: int = 5
    results: str = "benchmarks/results/finetune_instruction"

    def recipe(self, seed: int) -> instruction.Arguments:
        return instruction.Arguments(
            seed=seed,
            model=self.model,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            train_data=[Table(self.train_path)],
            sequence_length=self.sequence_length,
            global_batch_size=self.global_batch_size,
            per_device_batch_size=self.per_device_batch_size,
            lr_scheduler_type="constant",
            learning_rate=1e-4,
            max_steps=10**6,
            eval_steps=10**6,
            save_steps=10**6,
            logging_steps=10**6,
            report_to=[],
        )


class Data:
    """What all of them begin with."""

    def __init__(self, args: instruction.Arguments):
        self.args, self.tokenizer = args, load_tokenizer(args)
        set_chat_template(self.tokenizer, args)
        rows = [row for table in args.train_data for row in read_table(table)]
        self.examples, _ = to_examples(rows, self.tokenizer, args)
        self.config = model_config(args, self.tokenizer)

    def model(self) -> torch.nn.Module:
        return build_model(self.args, self.config, AutoModelForCausalLM)


def train_recipe(data: Data, seed: int, steps: int, observe: Observer, *, packing: bool) -> None:
    args = copy.copy(data.args)
    with TemporaryDirectory() as folder:
        args.output_dir, args.seed, args.packing = folder, seed, packing
        training = Training(args, RunFolder(folder))
        model = data.model()
        objective = instruction.AnswerLoss(model, packing)
        examples = data.examples
        epochs = Epochs(Mixture(examples, args), collate, {"the training data": ""}, args)
        training.prepare(objective, model, data.tokenizer, epochs)
        observe_recipe(training, steps, observe)


def train_trl(data: Data, seed: int, steps: int, observe: Observer, *, packing: bool) -> None:
    try:
        import trl
    except ImportError:
        raise InputError("this compares with trl: pip install trl==1.16.0") from None
    args = data.args
    settings = trainer_settings(args, steps) | {"seed": seed}
    if packing:  # a packed row is of sequence_length tokens, and holds several conversations
        settings["gradient_accumulation_steps"] = 1
    rows = datasets.Dataset.from_list([{"messages": e["messages"]} for e in data.examples])
    with TemporaryDirectory() as folder:
        observed(trl.SFTTrainer, observe)(
            data.model(),
            trl.SFTConfig(
                folder,
                max_length=args.sequence_length,
                packing=packing,
                assistant_only_loss=True,
                gradient_checkpointing=False,
                bf16=False,
                **settings,
            ),
            train_dataset=rows,
            processing_class=data.tokenizer,
        ).train()


PEERS = {
    PADDED: partial(train_recipe, packing=False),
    PACKED: partial(train_recipe, packing=True),
    TRL_PADDED: partial(train_trl, packing=False),
    TRL_PACKED: partial(train_trl, packing=True),
}


def measure(data: Data, name: str, seed: int, steps: int) -> dict[str, float]:
    train = partial(PEERS[name], data, seed, WARMUP + steps)
    return timed(train, WARMUP, WARMUP + steps)


def main() -> None:
    arguments = parse(Arguments)
    packages = ("torch", "transformers", "accelerate", "trl")
    facts = describe("python -m benchmarks.finetune_instruction", packages)
    settings = ("model", "sequence_length", "global_batch_size", "per_device_batch_size")
    facts |= {"threads": torch.get_num_threads()}
    facts |= {name: getattr(arguments, name) for name in (*settings, "steps", "turns")}
    datasets.disable_progress_bars()
    data = Data(arguments.recipe(0))
    turns, rates = by_turns(PEERS, arguments.turns, partial(measure, data, steps=arguments.steps))
    header = ["useful tokens/s", "this recipe padded, over it", "this recipe packed, over it"]
    rows = []
    for name in PEERS:
        beside = [ratios(rates[own], rates[name]) for own in (PADDED, PACKED)]
        cells = [name, median_and_range(rates[name], ",.0f")]
        cells += [median_and_range(values, ".2f") for values in beside]
        rows.append(cells)
    lines = [
        markdown_table(["", *header], rows, "lrrr"),
        "",
        f"Medians (least to most) of {arguments.turns} turns. The last columns are the recipe's "
        "speeds over that of the row's peer, taken turn by turn.",
        "",
    ]
    for peer, goal in GOALS.items():
        best = max(statistics.median(ratios(rates[own], rates[peer])) for own in (PADDED, PACKED))
        verdict = "reached" if best >= goal else "missed"
        lines.append(f"Goal beside {peer}: {goal} times its speed; {best:.2f}: {verdict}.")
    write_results(arguments.results, "\n".join(lines), facts, {"turns": turns, "rates": rates})


if __name__ == "__main__":
    command(main)
