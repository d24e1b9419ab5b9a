"""Distil an encoder: a smaller student learns from a teacher what stands in masked text.

DistilBERT (layers of the teacher; its probabilities, its last hidden states and the masked tokens),
TinyBERT (hidden states and attention, layer by layer) or MiniLM (relations of one layer), on one
process, eight GPUs, several nodes:

    python recipes/bert/distill.py recipes/bert/configs/distill_smoke.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml \\
        recipes/bert/distill.py recipes/bert/configs/distill_demo.yaml
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 8 \\
        recipes/bert/distill.py recipes/bert/configs/distill_distilbert_slimpajama.yaml
    sbatch accelerate_configs/slurm_multi_node.sh \\
        recipes/bert/distill.py recipes/bert/configs/distill_minilm6_slimpajama.yaml

The same command continues a run that was stopped; `--dry_run true` prints the plan instead.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import torch
import transformers

from encoder_arguments import EncoderArguments
from encoder_signals import ObservedEncoder, attention_loss, cosine_loss, relation_loss
from example_rows import check_examples, example_rows
from masked_check import check_objective, check_signals
from masked_evaluation import USAGE, MaskedEvaluation, facts_of_sequences, facts_of_test
from masked_loss import check_model
from masking import ExampleMaker
from sentence_encoder import SentenceEncoder
from utils.config import InputError, at_end, command, parse
from utils.divergences import add_projection, hidden_loss, summed_losses
from utils.lanes import Corpus, Lanes
from utils.loss import IGNORE_INDEX
from utils.memory import flops_per_token, parameter_count, plan
from utils.model import empty_model, load_tokenizer
from utils.report import conclude
from utils.run_folder import RunFolder
from utils.sources import check_held_out
from utils.stream import TrainingStream
from utils.teacher import (
    DistillationArguments,
    load_teacher,
    paired_layers,
    student_config,
    student_model,
    teacher_config,
    whole,
)
from utils.training import Training


@dataclass
class Arguments(DistillationArguments, EncoderArguments):
    """Distil an encoder on a stream of raw text: a student learns from a teacher."""

    model: dict[str, Any] = field(default_factory=lambda: {"model_type": "bert"})
    objective: Literal["mlm_nsp", "mlm_sop", "mlm"] = "mlm"  # pairs are not distilled
    # Tokens whose probabilities are learnt. all: as DistilBERT did it, 6.7 times as many as are
    # masked, for more time in the output layers; masked: those that the teacher had to guess
    soft_tokens: Literal["all", "masked"] = "all"
    cosine_weight: float = 0.0  # of 1 - the cosine of the last hidden states
    attention_weight: float = 0.0  # of the squared difference of attention scores, as layer_map
    relation_weight: float = 0.0  # of the divergence of relations among queries, keys and values
    relation_heads: int = 48  # that all heads of a layer are cut into for it, in both models
    relation_layer: int | None = None  # of the teacher, from 1; null: the last, as the student's
    weights: ClassVar[Sequence[str]] = (
        *DistillationArguments.weights,
        "cosine_weight",
        "attention_weight",
        "relation_weight",
    )

    def check(self) -> None:
        if self.objective != "mlm":
            raise InputError(f"objective: {self.objective} is not distilled: leave it at mlm")
        for name in ("relation_heads", "relation_layer"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if self.torch_compile and (self.attention_weight or self.relation_weight):
            raise InputError(
                "torch_compile: attention_weight and relation_weight look into the attention, "
                "which a compiled model does not let: leave it out"
            )
        super().check()

    def fixed(self) -> dict[str, Any]:
        names = ("soft_tokens", "relation_heads", "relation_layer")
        return super().fixed() | {name: getattr(self, name) for name in names}


class DistillationLoss(ObservedEncoder):
    """Sums over tokens of what the student lacks of its teacher, and of the masked tokens' loss.

    The teacher sees the rows of the student, in evaluation mode; it is no submodule.

    Args:
        projection: from the student's width to the teacher's.
        layers: for each layer of the student that of the teacher, from 1.
    """

    def __init__(
        self,
        model: "transformers.PreTrainedModel",
        teacher: "transformers.PreTrainedModel",
        projection: torch.nn.Module,
        layers: list[int],
        arguments: Arguments,
    ):
        super().__init__(model, arguments.objective, arguments.packing)
        self.arguments, self.projection, self.layers = arguments, projection, layers
        self._teacher = (ObservedEncoder(teacher, arguments.objective, arguments.packing),)
        given = {
            name.removesuffix("_weight"): getattr(arguments, name) for name in Arguments.weights
        }
        # that of the labels is logged in any case, and gives every weight of a head its gradient
        self.weights = {"mlm_loss": given.pop("hard")}
        self.weights |= {f"{name}_loss": weight for name, weight in given.items() if weight}
        self.names = tuple(self.weights)
        last = model.config.get_text_config().num_hidden_layers
        related = arguments.relation_layer or teacher.config.get_text_config().num_hidden_layers
        self.related = (last, related)
        self.observed: tuple[set[int], set[int]] = (set(), set())  # layers of student and teacher
        if arguments.attention_weight:
            self.observed = ({*range(1, last + 1)}, {*layers})
        if arguments.relation_weight:
            self.observed = tuple(o | {n} for o, n in zip(self.observed, self.related, strict=True))

    @property
    def teacher(self) -> ObservedEncoder:
        return self._teacher[0]

    def forward(self, per_target: bool = False, **batch: torch.Tensor) -> dict[str, Any]:
        """As that of `MaskedLoss`: the sum of each loss, or `per_target` those of the student."""
        if per_target:
            return super().forward(per_target=True, **batch)
        batch = self.without_empty_columns(batch)
        kept, labels = batch["sequence_ids"] > 0, batch["labels"]
        is_target = labels != IGNORE_INDEX
        seen = kept if self.learns("soft") and self.arguments.soft_tokens == "all" else is_target
        places = seen.flatten().nonzero().squeeze(1)
        signals = partial(ObservedEncoder.signals, batch=batch, hidden_states=self.learns("hidden"))
        mine = signals(self, targets=places, attention=self.observed[0])
        with torch.no_grad():
            theirs = signals(self.teacher, targets=places, attention=self.observed[1])
        of_target = mine.entering[is_target[seen]]
        losses = {"mlm_loss": summed_losses(self.logits(of_target), labels[is_target])[0]}
        if self.learns("soft"):
            logits = self.teacher.logits(theirs.entering)
            with whole(logits.weight, logits.bias):
                divergence = self.arguments.as_divergence
                student = self.logits(mine.entering)
                losses["soft_loss"] = summed_losses(student, None, logits, divergence)[1]
        if self.learns("cosine"):
            student = self.projection(mine.last_hidden_state[kept])
            losses["cosine_loss"] = cosine_loss(student, theirs.last_hidden_state[kept])
        if self.learns("hidden"):
            states = (mine.hidden_states, theirs.hidden_states)
            losses["hidden_loss"] = hidden_loss(*states, self.layers, self.projection, kept)
        rows, attention = batch["sequence_ids"], (mine.attention, theirs.attention)
        if self.learns("attention"):
            losses["attention_loss"] = attention_loss(*attention, self.layers, rows)
        if self.learns("relation"):
            pair = (found[layer] for found, layer in zip(attention, self.related, strict=True))
            losses["relation_loss"] = relation_loss(*pair, self.arguments.relation_heads, rows)
        return losses

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        targets = int((batch["labels"] != IGNORE_INDEX).sum())
        counts = dict.fromkeys(self.names, int((batch["sequence_ids"] > 0).sum()))
        of_targets = ["mlm_loss"] + ["soft_loss"] * (self.arguments.soft_tokens == "masked")
        return counts | {name: targets for name in of_targets if name in counts}

    def learns(self, name: str) -> bool:
        return f"{name}_loss" in self.weights


def check_pair(args: Arguments, student: Any, teacher: Any) -> list[int]:
    """For each layer of the student that of the teacher, from 1.

    Args:
        student, teacher: configurations.

    Raises:
        InputError: the two do not fit what is to be learnt.
    """
    layers, both = paired_layers(args, student, teacher), {"student": student, "teacher": teacher}
    heads = [config.get_text_config().num_attention_heads for config in both.values()]
    if args.attention_weight and heads[0] != heads[1]:
        raise InputError(
            f"attention_weight: the student has {heads[0]} heads a layer and the teacher "
            f"{heads[1]}: make them as many, or take relation_weight"
        )
    if args.relation_weight:
        for name, config in both.items():
            width = config.get_text_config().hidden_size
            if width % args.relation_heads:
                raise InputError(
                    f"relation_heads: {args.relation_heads} do not divide the {name}'s width of "
                    f"{width}"
                )
        count = teacher.get_text_config().num_hidden_layers
        if args.relation_layer is not None and args.relation_layer > count:
            raise InputError(f"relation_layer: {args.relation_layer} of the teacher's {count}")
    return layers


@contextmanager
def of_the_teacher() -> Iterator[None]:
    """What is wrong in this context is wrong of the teacher."""
    try:
        yield
    except InputError as error:
        raise InputError(f"teacher: {error}") from None


@at_end
def main() -> None:
    args = parse(Arguments)
    auto_model = transformers.AutoModelForMaskedLM
    tokenizer = load_tokenizer(args)
    configs = [given := teacher_config(args, tokenizer), student_config(args, given, tokenizer)]
    layers = check_pair(args, configs[1], configs[0])
    with of_the_teacher():
        check_model(empty_model(configs[0], auto_model), args)
    check_model(empty_model(configs[1], auto_model), args)
    predicted = 1.0 if args.soft_weight and args.soft_tokens == "all" else args.mlm_probability
    if args.dry_run:
        phases = [(phase.sequence_length, phase.steps) for phase in args.phases]
        print(plan(configs[1], args, phases, auto_model, predicted))
        return
    encode, make_examples = SentenceEncoder(tokenizer), ExampleMaker(tokenizer, args)
    corpus = Corpus(args)
    check_examples(args.train_sources, encode, args.objective, args)
    check_held_out(args.validation_sources, args.eval_documents, args)
    check_held_out(args.test_sources, None, args)
    folder = RunFolder(args.output_dir, args.resume)
    if folder.is_finished(args, corpus.fingerprint()):
        return

    training = Training(args, folder)
    teacher = load_teacher(args, configs[0], auto_model, training.accelerator)
    model = student_model(args, configs[1], auto_model, folder.path)
    is_projected = args.hidden_weight or args.cosine_weight
    projection = add_projection(model, teacher, args.seed) if is_projected else torch.nn.Identity()
    objective = DistillationLoss(model, teacher, projection, layers, args)

    flops = {}
    for length in {phase.sequence_length for phase in args.all_phases()}:
        both = [flops_per_token(config, length, auto_model, predicted) for config in configs]
        flops[length] = both[0] / 3 + both[1]  # of a forward pass alone, and of both
    lanes = Lanes(corpus, encode)
    rows_of = partial(example_rows, lanes, make_examples, args.phase_rows(), args.packing)
    stream = TrainingStream(lanes, rows_of, args)
    training.prepare(
        objective,
        model,
        tokenizer,
        stream,
        flops_per_token=lambda step: flops[args.phase_at(step - 1).sequence_length],
    )
    scores = partial(training.forward, per_target=True)

    @torch.no_grad()
    def scores_of_teacher(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        batch = {name: tensor.to(training.accelerator.device) for name, tensor in batch.items()}
        with training.accelerator.autocast():
            return objective.teacher(per_target=True, **batch)

    check_objective(objective, scores, {*flops})
    with of_the_teacher():
        check_objective(objective.teacher, scores_of_teacher, {*flops})
    check_signals(objective, training.forward)
    evaluation = MaskedEvaluation(training, encode, make_examples, scores, args.packing)
    for step in training.steps():
        if training.evaluates():
            training.record_evaluation(evaluation.validation(step))
        if args.phase_at(step) != args.phase_at(step - 1):
            training.state.forget()  # losses of another length
    if training.stopped:
        return

    counts = [parameter_count(config, auto_model)["total"] for config in configs]
    facts = {"parameters": f"{counts[1]:,}", "the teacher's parameters": f"{counts[0]:,}"}
    if args.test_sources:
        results = evaluation.test()
        of_teacher = results and replace(evaluation, scores=scores_of_teacher).test()
        if of_teacher is None:
            return training.stop()
        training.record_test(results)
        facts |= facts_of_test(results) | facts_of_test(of_teacher, "the teacher's ")
    facts |= facts_of_sequences(folder.records())
    conclude(training, "Encoder", "fill-mask", USAGE, facts)


if __name__ == "__main__":
    command(main)
