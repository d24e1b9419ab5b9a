"""Distil a causal language model into a smaller one, on raw text or on conversations.

The teacher beside the student, or its likeliest tokens from a cache that one pass has written; one
CPU process, two, eight GPUs:

    python recipes/causal_lm/distill.py recipes/causal_lm/configs/distill_smoke.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml \\
        recipes/causal_lm/distill.py recipes/causal_lm/configs/distill_demo.yaml
    accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 8 \\
        recipes/causal_lm/distill.py recipes/causal_lm/configs/distill_7b_conversations.yaml
    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 8 \\
        recipes/causal_lm/distill.py recipes/causal_lm/configs/distill_8b_slimpajama.yaml \\
        --teacher_cache runs/causal_lm/teacher_cache --write_teacher_cache

The same command continues a run, or a cache, that was stopped.
"""

import signal
from dataclasses import dataclass
from functools import partial
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import torch
import transformers

from causal_head import CausalHead, check_model
from conversations import ConversationArguments
from distillation_data import Conversations, Text
from teacher_cache import CacheArguments, check_cache, write_cache
from text_evaluation import TextEvaluationArguments
from top_tokens import TopTokens
from utils.arguments import FinetuningArguments, TrainingArguments
from utils.config import InputError, at_end, command, parse
from utils.divergences import add_projection, hidden_loss, summed_losses
from utils.loss import IGNORE_INDEX
from utils.memory import parameter_count
from utils.model import load_tokenizer
from utils.plan import PlanArguments, flops_per_token
from utils.report import conclude
from utils.run_folder import RunFolder
from utils.scoring import write_predictions
from utils.stream import StreamArguments
from utils.teacher import (
    DistillationArguments,
    distillation_plan,
    load_teacher,
    of_the_teacher,
    paired_layers,
    student_config,
    student_model,
    teacher_config,
    whole,
)
from utils.training import Training

USAGE = """
from transformers import pipeline

generate = pipeline("text-generation", "{model}")
print(generate("def ", max_new_tokens=60)[0]["generated_text"])
"""


@dataclass
class TextArguments(
    DistillationArguments,
    CacheArguments,
    TrainingArguments,
    StreamArguments,
    TextEvaluationArguments,
    PlanArguments,
):
    """Distil a causal language model on a stream of raw text."""

    packing: bool = True  # rows full of documents, which do not see each other; false: one a row

    def check(self) -> None:
        super().check()
        if self.teacher_cache is not None and self.total_steps is None:
            raise InputError("teacher_cache: say how long the run is: max_steps or max_tokens")

    def fixed(self) -> dict[str, Any]:
        return super().fixed() | {"packing": self.packing}


@dataclass
class ConversationsArguments(
    DistillationArguments,
    CacheArguments,
    FinetuningArguments,
    ConversationArguments,
    PlanArguments,
):
    """Distil a causal language model on conversations: the tokens of the assistant."""

    packing: bool = False  # several conversations a row, which do not see each other
    # of the steps, in which the student writes the answers: 0 those of the data, 1 always
    on_policy_share: float = 0.0
    on_policy_tokens: int = 128  # of an answer that the student writes, at most
    on_policy_temperature: float = 1.0  # at which it is drawn
    sample_answers: int = 3  # to the first conversations of validation_data, at each evaluation

    def check(self) -> None:
        super().check()
        if not 0 <= self.on_policy_share <= 1:
            raise InputError(f"on_policy_share must be in [0, 1], not {self.on_policy_share}")
        if self.on_policy_tokens < 1 or not 0 < self.on_policy_temperature < float("inf"):
            raise InputError("on_policy_tokens and on_policy_temperature must be more than 0")
        if self.on_policy_share and self.teacher_cache is not None:
            raise InputError(
                "on_policy_share: a teacher_cache holds the answers of the data alone: leave it 0"
            )
        self.check_metric(("eval_loss", "eval_token_accuracy"))

    def fixed(self) -> dict[str, Any]:
        names = ("packing", "on_policy_share", "on_policy_tokens", "on_policy_temperature")
        return super().fixed() | {name: getattr(self, name) for name in names}


Arguments = (TextArguments, ConversationsArguments)  # the keys of a config say which


class DistillationLoss(torch.nn.Module):
    """Σ of the divergence from the teacher, of the labels' loss, and of hidden states, by token.

    The teacher sees what the student sees. It is no part of this module: `train()`, an optimizer
    and what wraps the module do not reach it.

    Args:
        teacher: None where batches hold its likeliest tokens.
        layers: of the teacher, beside each of the student's: as `paired_layers` gives them.
    """

    def __init__(self, model: Any, teacher: Any, arguments: Any, layers: list[int]):
        super().__init__()
        a = arguments
        self.model, self.packing, self.divergence = model, a.packing, a.as_divergence
        self.layers = layers if a.hidden_weight else None
        self.head = CausalHead(model, keeps_layers=bool(a.hidden_weight))
        self.taught = None
        if teacher is not None:
            self.taught = CausalHead(teacher, keeps_layers=bool(a.hidden_weight))
            self.taught.router_weight = 0.0
        if a.hidden_weight:
            self.projection = add_projection(model, teacher, a.seed)
        self.weights = {"soft_loss": a.soft_weight, "hard_loss": a.hard_weight}
        self.weights |= {"hidden_loss": a.hidden_weight} if a.hidden_weight else {}
        self.names = (*self.weights, *self.head.names[1:])

    def forward(
        self,
        input_ids: torch.Tensor,
        shift_labels: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: torch.Tensor | None = None,
        top_ids: torch.Tensor | None = None,
        top_log_probabilities: torch.Tensor | None = None,
        scores_of: str | None = None,
    ) -> Any:
        """
        Args:
            batch: of shape (rows, tokens), and `lengths` (rows,); `top_…` also by token, from a
                cache. Position ids that restart keep the documents of a row apart.
            scores_of: "student" or "teacher", whose scores alone are wanted.

        Returns:
            {name: its sum}, or (loss, whether the label is the most likely token) by position.
        """
        shape, places = input_ids.shape, position_ids if self.packing else None
        if not self.packing and lengths is not None:  # columns of nothing but padding are left out
            longest = max(2, int(lengths.max()))
            input_ids, shift_labels = input_ids[:, :longest], shift_labels[:, :longest]
        seen = (input_ids, places, lengths)
        if scores_of is not None:
            head = self.head if scores_of == "student" else self.taught
            hidden, _ = head.hidden_states(*seen)
            split = head.logits(hidden)[1:3] if scores_of == "teacher" else ()
            with whole(*split):
                found = head.token_scores(hidden, shift_labels)
            room = (0, shape[1] - shift_labels.shape[1])
            return tuple(torch.nn.functional.pad(values, room) for values in found)
        hidden, terms = self.head.hidden_states(*seen)
        kept = shift_labels != IGNORE_INDEX
        if self.taught is None:
            columns = slice(input_ids.shape[1])
            tops = (top_ids[:, columns][kept], top_log_probabilities[:, columns][kept])
            teacher, parameters = TopTokens(*tops), ()
        else:
            with torch.no_grad():
                taught, _ = self.taught.hidden_states(*seen)
            teacher = self.taught.logits(taught[kept])
            parameters = teacher[1:3]
        with whole(*parameters):
            hard, soft = summed_losses(
                self.head.logits(hidden[kept]),
                shift_labels[kept],
                teacher,
                self.divergence,
                hard_weight=self.weights["hard_loss"],
                soft_weight=self.weights["soft_loss"],
            )
        losses = {"soft_loss": soft, "hard_loss": hard, **terms}
        if self.layers is not None:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            is_text = places < lengths[:, None]
            pairs = (self.head.layers, self.taught.layers)
            losses["hidden_loss"] = hidden_loss(*pairs, self.layers, self.projection, is_text)
            self.head.layers = self.taught.layers = ()
        return losses

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        targets = int((batch["shift_labels"] != IGNORE_INDEX).sum())
        tokens = int(batch["lengths"].sum())
        of_targets = ("soft_loss", "hard_loss")
        return {name: targets if name in of_targets else tokens for name in self.names}


@at_end
def main() -> None:
    args = parse(Arguments)
    auto_model = transformers.AutoModelForCausalLM
    tokenizer = load_tokenizer(args)
    of_teacher = teacher_config(args, tokenizer)
    config = student_config(args, of_teacher, tokenizer)
    layers = paired_layers(args, config, of_teacher) if args.hidden_weight else []
    if args.dry_run:
        print(distillation_plan(config, of_teacher, args))
        return
    kind = Text if isinstance(args, TextArguments) else Conversations
    data = kind(tokenizer, args)
    args = data.arguments
    if args.write_teacher_cache:
        return write_cache(args, of_teacher, data.cache)
    if data.cache:
        check_cache(data.cache, args)
    folder = RunFolder(args.output_dir, args.resume)
    if folder.is_finished(args, data.fingerprint):
        return

    training = Training(args, folder)
    teacher, is_cached = None, data.cache is not None
    if not is_cached:
        teacher = load_teacher(args, of_teacher, auto_model, training.accelerator)
    model = student_model(args, config, auto_model, folder.path)
    objective = DistillationLoss(model, teacher, args, layers)
    flops = flops_per_token(config, args.sequence_length)
    flops += 0 if is_cached else flops_per_token(of_teacher, args.sequence_length) // 3
    steps = data.steps(training, model)
    training.prepare(objective, model, tokenizer, steps, flops_per_token=lambda step: flops)
    scores, taught = (partial(training.forward, scores_of=of) for of in ("student", "teacher"))
    length, packing = args.sequence_length, args.packing
    check_model(model, lambda batch: scores(batch)[0], length, packing)
    if teacher is not None:
        with of_the_teacher():
            check_model(teacher, lambda batch: taught(batch)[0], length, packing)
    for step in training.steps():
        if training.evaluates():
            found: Any = ({}, [])
            if data.has_validation:
                found = data.evaluate(training, scores, "validation")
            samples = data.samples(training, model)
            # a resume evaluates again where a signal cut the samples short
            training.record_evaluation(found and found[0] if samples is not None else None)
            if samples:
                training.log({"step": step, "samples": samples})
    if training.stopped:
        return

    count, whole_count = (f"{parameter_count(c)['total']:,}" for c in (config, of_teacher))
    facts = {"parameters": count, "parameters of the teacher": whole_count, **data.facts}
    if data.has_test:
        training.load_best()
        found, of_teacher, name = data.evaluate(training, scores, "test"), None, data.metric
        if found and not is_cached:
            of_teacher = data.evaluate(training, taught, "test")
        if found is None or (of_teacher is None and not is_cached):
            return training.stop()
        results, records = found
        if of_teacher:
            for end in (name, f"{name}_by_domain"):
                if f"eval_{end}" in of_teacher[0]:
                    results[f"teacher_{end}"] = of_teacher[0][f"eval_{end}"]
            pairs = zip(records, of_teacher[1], strict=True)
            records = [one | {"teacher_loss": other["loss"]} for one, other in pairs]
        training.record_test(results)
        with training.ranks.together():
            if training.is_main and records:
                write_predictions(folder.path / "predictions.jsonl", records)
        for whose in ("eval", "teacher"):
            if f"{whose}_{name}" in results:
                by = " by the teacher" if whose == "teacher" else ""
                what = f"{name.replace('_', ' ')} of the test{by}"
                facts[what] = f"{results[f'{whose}_{name}']:.4f}"
    conclude(training, "Distilled language model", "text-generation", USAGE, facts)


if __name__ == "__main__":
    command(main)
