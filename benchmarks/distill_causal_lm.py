"""Distillation of a causal language model beside trl's GKDTrainer and DistillationTrainer.

    pip install trl==1.16.0
    python -m benchmarks.distill_causal_lm

All teach the same student by the same teacher with the same optimizer on the same conversations,
tokenized before the clock starts: the generalised Jensen-Shannon divergence (beta 0.5, temperature
1) on the answers alone, none of them sampled: GKDTrainer with lmbda 0, and DistillationTrainer,
which always samples, is handed the answers in place of its samples. The loss of the first step has
to agree. The peers take turns in one process; the peak of their memory is measured in a fresh
process for each. Results: benchmarks/results/distill_causal_lm.md and .json.
"""

import json
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

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
from conversations import collate, set_chat_template, to_examples
from recipes.causal_lm import distill
from utils.config import InputError, command, parse
from utils.epochs import Epochs, Mixture
from utils.loss import IGNORE_INDEX
from utils.model import build_model, load_tokenizer, model_config
from utils.report import markdown_table
from utils.run_folder import RunFolder
from utils.sources import Source, held_out_documents
from utils.tables import Table, read_table
from utils.teacher import Teacher, teacher_config
from utils.training import Training

RECIPE, GKD, DISTILLATION = "this recipe", "trl's GKDTrainer", "trl's DistillationTrainer"
GOALS = {"speed": 1.2, "memory": 0.5}  # beside the better one
WARMUP = 1  # steps of a turn that are not timed
MEMORY_STEPS = 2
PROMPT = 200  # characters of a document; the rest is the answer
MEBIBYTE = 2**20


@dataclass
class Arguments:
    """Measure the distillation recipe beside trl's trainers."""

    # a large vocabulary beside small layers, as it is of small models: SmolLM2's 49,152 words are
    # 28 of its 135 million weights
    student: dict[str, Any] = field(
        default_factory=lambda: {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "initializer_range": 0.1,
        }
    )
    teacher_layers: int = 8  # of the same width
    tokenizer: str = "data/tokenizers/bpe-8192"
    texts: str = "data/sample/test.jsonl"
    sequence_length: int = 512
    batch_size: int = 8  # conversations a step
    steps: int = 4  # of a turn, after one that is not timed
    turns: int = 3
    results: str = "benchmarks/results/distill_causal_lm"

    def recipe(self, seed: int, folder: str) -> distill.ConversationsArguments:
        teacher = self.student | {"num_hidden_layers": self.teacher_layers}
        return distill.ConversationsArguments(
            seed=seed,
            output_dir=f"{folder}/run",
            model=self.student,
            teacher=Teacher(model=teacher),
            divergence="jsd",
            beta=0.5,
            tokenizer=self.tokenizer,
            chat_template="plain",
            train_data=[Table(f"{folder}/conversations.jsonl")],
            on_long_example="truncate",
            sequence_length=self.sequence_length,
            global_batch_size=self.batch_size,
            per_device_batch_size=self.batch_size,
            lr_scheduler_type="constant",
            learning_rate=1e-4,
            max_steps=10**6,
            eval_steps=10**6,
            save_steps=10**6,
            logging_steps=1,
            report_to=[],
        )


class Data:
    """What all of them begin with.

    Args:
        count: of conversations; None: all.
    """

    def __init__(self, arguments: Arguments, seed: int, folder: str, count: int | None = None):
        self.args = arguments.recipe(seed, folder)
        documents = held_out_documents([Source(arguments.texts)], count)
        texts = [document.text for document in documents if len(document.text) > 2 * PROMPT]
        lines = [
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": text[:PROMPT]},
                        {"role": "assistant", "content": text[PROMPT:]},
                    ]
                }
            )
            for text in texts
        ]
        Path(folder, "conversations.jsonl").write_text("\n".join(lines))
        self.tokenizer = load_tokenizer(self.args)
        set_chat_template(self.tokenizer, self.args)
        rows = [row for table in self.args.train_data for row in read_table(table)]
        self.examples, _ = to_examples(rows, self.tokenizer, self.args)

    def student(self) -> PreTrainedModel:
        return build_model(self.args, model_config(self.args, self.tokenizer), AutoModelForCausalLM)

    def teacher(self) -> PreTrainedModel:
        config = teacher_config(self.args, self.tokenizer)
        model = build_model(self.args.of_teacher(), config, AutoModelForCausalLM)
        return model.requires_grad_(False).eval()


def train_recipe(data: Data, steps: int, observe: Observer) -> float:
    """Each of the peers returns the mean loss of its steps."""
    args = data.args
    folder = RunFolder(args.output_dir)
    training = Training(args, folder)
    model = data.student()
    objective = distill.DistillationLoss(model, data.teacher(), args, [])
    epochs = Epochs(Mixture(data.examples, args), collate, {"the training data": ""}, args)
    training.prepare(objective, model, data.tokenizer, epochs)
    observe_recipe(training, steps, observe)
    return statistics.fmean(record["loss"] for record in folder.records() if "loss" in record)


def train_gkd(data: Data, steps: int, observe: Observer) -> float:
    _, gkd = import_trl()

    def collated(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate([[row] for row in rows])
        ids, targets = batch["input_ids"], batch["shift_labels"]
        labels = torch.full_like(targets, IGNORE_INDEX)
        labels[:, 1:] = targets[:, :-1]
        is_text = torch.arange(ids.shape[1]) < batch["lengths"][:, None]
        return {"input_ids": ids, "attention_mask": is_text.long(), "labels": labels}

    rows = [{key: e[key] for key in ("input_ids", "shift_labels")} for e in data.examples]
    with TemporaryDirectory() as folder:
        trainer = observed(gkd.GKDTrainer, observe)(
            data.student(),
            data.teacher(),
            gkd.GKDConfig(
                folder,
                lmbda=0.0,
                beta=data.args.beta,
                temperature=1.0,
                gradient_checkpointing=False,
                bf16=False,
                **trainer_settings(data.args, steps),
            ),
            data_collator=collated,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=data.tokenizer,
        )
        trainer.train()
        return trainer.state.log_history[-1]["train_loss"]


def train_distillation(data: Data, steps: int, observe: Observer) -> float:
    trl, _ = import_trl()

    class Given(trl.DistillationTrainer):
        """Takes the answers of the data for its samples; its prompts are numbers of examples."""

        useful = 0

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
            self.given = [data.examples[int(prompt)] for prompt in prompts]
            return [e["input_ids"][: first_target(e)].tolist() for e in self.given], None, {}

        def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *rest):
            self.useful += sum(len(e["input_ids"]) for e in self.given)
            return [e["input_ids"][first_target(e) :].tolist() for e in self.given]

    with TemporaryDirectory() as folder:
        trainer = observed(Given, observe, lambda trainer, _: trainer.useful)(
            data.student(),
            data.teacher(),
            trl.DistillationConfig(
                folder,
                beta=data.args.beta,
                temperature=1.0,
                max_completion_length=data.args.sequence_length,
                gradient_checkpointing=False,
                bf16=False,
                **trainer_settings(data.args, steps),
            ),
            train_dataset=datasets.Dataset.from_list(
                [{"prompt": str(number)} for number in range(len(data.examples))]
            ),
            processing_class=data.tokenizer,
        )
        trainer.train()
        return trainer.state.log_history[-1]["train_loss"]


def import_trl() -> tuple[Any, Any]:
    try:
        import trl
        from trl.experimental import gkd
    except ImportError:
        raise InputError("this compares with trl: pip install trl==1.16.0") from None
    return trl, gkd


def first_target(example: dict[str, Any]) -> int:
    """The place of the first token that is learnt; what follows is the answer."""
    return int((example["shift_labels"] != IGNORE_INDEX).argmax()) + 1


PEERS = {RECIPE: train_recipe, GKD: train_gkd, DISTILLATION: train_distillation}


def measure_loss(arguments: Arguments, name: str) -> float:
    """Of one step over the first conversations, in whatever order."""
    with TemporaryDirectory() as folder:
        data = Data(arguments, 0, folder)
        del data.examples[arguments.batch_size :]
        return PEERS[name](data, 1, lambda step, tokens: None)


def measure_speed(arguments: Arguments, name: str, seed: int) -> dict[str, float]:
    last = WARMUP + arguments.steps
    with TemporaryDirectory() as folder:
        return timed(partial(PEERS[name], Data(arguments, seed, folder), last), WARMUP, last)


def measure_memory(arguments: Arguments, name: str) -> int:
    with TemporaryDirectory() as folder:
        train = partial(PEERS[name], Data(arguments, 0, folder), MEMORY_STEPS)
        return peak_memory(train, MEMORY_STEPS)


def main() -> None:
    arguments = parse(Arguments)
    packages = ("torch", "transformers", "accelerate", "trl")
    facts = describe("python -m benchmarks.distill_causal_lm", packages)
    facts |= {"threads": torch.get_num_threads()}
    names = ("student", "teacher_layers", "sequence_length", "batch_size", "steps", "turns")
    facts |= {name: getattr(arguments, name) for name in names}
    datasets.disable_progress_bars()
    memory, losses = {}, {}
    for name in PEERS:
        memory[name] = in_a_fresh_process(measure_memory, arguments, name)
        losses[name] = measure_loss(arguments, name)
        print(f"{name}: {memory[name] / MEBIBYTE:,.0f} MiB, loss {losses[name]:.6f}", flush=True)
        if abs(losses[name] / losses[RECIPE] - 1) > 1e-4:
            raise InputError(f"{name} learns something else: {losses}")
    turns, rates = by_turns(PEERS, arguments.turns, partial(measure_speed, arguments))
    text = as_table(arguments, rates, memory, losses)
    measured = {"turns": turns, "rates": rates, "peak_memory_bytes": memory, "losses": losses}
    write_results(arguments.results, text, facts, measured)


def as_table(
    arguments: Arguments,
    rates: dict[str, list[float]],
    memory: dict[str, int],
    losses: dict[str, float],
) -> str:
    header = ["", "useful tokens/s", "peak memory", "loss of the first step"]
    header += ["speed of the recipe", "memory of the recipe"]
    speed = {name: ratios(rates[RECIPE], rates[name]) for name in PEERS}
    rows = [
        [
            name,
            median_and_range(rates[name], ",.0f"),
            f"{memory[name] / MEBIBYTE:,.0f} MiB",
            f"{losses[name]:.6f}",
            median_and_range(speed[name], ".2f"),
            f"{memory[RECIPE] / memory[name]:.2f}",
        ]
        for name in PEERS
    ]
    peers = [name for name in PEERS if name != RECIPE]
    least = min(statistics.median(speed[name]) for name in peers)
    most = max(memory[RECIPE] / memory[name] for name in peers)
    reached = {"speed": least >= GOALS["speed"], "memory": most <= GOALS["memory"]}
    verdicts = {name: "reached" if met else "missed" for name, met in reached.items()}
    return "\n".join(
        [
            markdown_table(header, rows, "lrrrrr"),
            "",
            f"Medians (least to most) of {arguments.turns} turns; the recipe's speed and memory "
            "over those of the row's peer. Memory: the peak of a process in its first steps, over "
            "what it held before them.",
            "",
            f"Goal: {GOALS['speed']} times the speed of the faster of trl's; {least:.2f}: "
            f"{verdicts['speed']}. Goal: {GOALS['memory']} of the memory of the smaller; "
            f"{most:.2f}: {verdicts['memory']}.",
        ]
    )


if __name__ == "__main__":
    command(main)
