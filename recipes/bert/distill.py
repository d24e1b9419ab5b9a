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

The same command continues a run that was stopped; `--dry_run` prints the plan instead.
"""

import signal
from collections.abc import Sequence
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
from masked_evaluation import (
    USAGE,
    MaskedEvaluation,
    facts_of_sequences,
    facts_of_test,
    forget_losses,
)
from masked_loss import check_model
from masking import ExampleMaker
from sentence_encoder import SentenceEncoder
from utils.config import InputError, at_end, command, parse
from utils.divergences import Logits, add_projection, hidden_loss, summed_losses
from utils.lanes import Corpus, Lanes
from utils.loss import IGNORE_INDEX
from utils.memory import parameter_count
from utils.model import empty_model, load_tokenizer
from utils.plan import flops_per_token
from utils.report import conclude
from utils.run_folder import RunFolder
from utils.sources import check_held_out
from utils.stream import TrainingStream
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


@dataclass
class Arguments(DistillationArguments, EncoderArguments):
    """Distil an encoder on a stream of raw text: a student learns from a teacher."""

    model: dict[str, Any] = field(default_factory=lambda: {"model_type": "bert"})
    objective: Literal["mlm_nsp", "mlm_sop", "mlm"] = "mlm"  # the teacher's own
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

    The teacher sees what the student sees. It is no part of this module: `train()`, an optimizer
    and what wraps the module do not reach it.

    Args:
        taught: the teacher; see `observed`.
        projection: from the student's width to the teacher's.
        layers: of the teacher, beside each of the student's: as `check_pair` gives them.
    """

    def __init__(
        self,
        model: "transformers.PreTrainedModel",
        taught: ObservedEncoder,
        projection: torch.nn.Module,
        layers: list[int],
        arguments: Arguments,
    ):
        a, count = arguments, model.config.get_text_config().num_hidden_layers
        of_attention = {*range(1, count + 1)} if a.attention_weight else set()
        of_attention |= {count} if a.relation_weight else set()
        super().__init__(model, a.objective, a.packing, bool(a.hidden_weight), of_attention)
        self.projection, self.layers, self.divergence = projection, layers, a.as_divergence
        self.relation_heads, self.related = (
            a.relation_heads,
            (count, relation_layer(a, taught.config)),
        )
        self._taught = (taught,)  # which torch does not take for a part
        given = {name.removesuffix("_weight"): getattr(a, name) for name in a.weights}
        self.weights = {f"{name}_loss": weight for name, weight in given.items() if weight}
        # in any case: it is logged, and no weight of the head is left without a gradient
        self.weights["hard_loss"] = a.hard_weight
        for term in self.terms[1:]:
            self.weights[f"hard_{term}_loss"] = a.hard_weight
            self.weights |= {f"soft_{term}_loss": a.soft_weight} if a.soft_weight else {}
        self.names = tuple(self.weights)
        self.learns_all = a.soft_tokens == "all" and "soft_loss" in self.names

    @property
    def taught(self) -> ObservedEncoder:
        return self._taught[0]

    def forward(self, per_target: bool = False, **batch: torch.Tensor) -> dict[str, Any]:
        """
        Args:
            batch: as that of `MaskedLoss`.

        Returns:
            {name: its sum}, or if `per_target` what `MaskedLoss` gives for the student.
        """
        if per_target:
            return super().forward(per_target=True, **batch)
        batch = self.without_empty_columns(batch)
        kept, labels, names = batch["sequence_ids"] > 0, batch["labels"], self.names
        is_target = labels != IGNORE_INDEX
        seen = kept if self.learns_all else is_target
        places = seen.flatten().nonzero().squeeze(1)
        mine = self.signals(batch, places)
        with torch.no_grad():
            theirs = self.taught.signals(batch, places)
        student = self.logits(mine.entering[is_target[seen]])
        losses = {"hard_loss": summed_losses(student, labels[is_target])[0]}
        if "soft_loss" in names:
            student, teacher = self.logits(mine.entering), self.taught.logits(theirs.entering)
            with whole(teacher.weight, teacher.bias):
                losses["soft_loss"] = summed_losses(student, None, teacher, self.divergence)[1]
        for term in self.terms[1:]:
            is_pair = batch["pair_labels"] != IGNORE_INDEX
            student, teacher = Logits(mine.pairs), Logits(theirs.pairs)
            hard = summed_losses(student, batch["pair_labels"][is_pair])[0]
            losses[f"hard_{term}_loss"] = hard
            if "soft_loss" in names:
                soft = summed_losses(student, None, teacher, self.divergence)[1]
                losses[f"soft_{term}_loss"] = soft
        if "cosine_loss" in names:
            last = self.projection(mine.last_hidden_state[kept])
            losses["cosine_loss"] = cosine_loss(last, theirs.last_hidden_state[kept])
        if "hidden_loss" in names:
            states = mine.hidden_states, theirs.hidden_states
            losses["hidden_loss"] = hidden_loss(*states, self.layers, self.projection, kept)
        rows, attention = batch["sequence_ids"], (mine.attention, theirs.attention)
        if "attention_loss" in names:
            losses["attention_loss"] = attention_loss(*attention, self.layers, rows)
        if "relation_loss" in names:
            pair = (found[layer] for found, layer in zip(attention, self.related, strict=True))
            losses["relation_loss"] = relation_loss(*pair, self.relation_heads, rows)
        return losses

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        targets = int((batch["labels"] != IGNORE_INDEX).sum())
        tokens = int((batch["sequence_ids"] > 0).sum())
        pairs = int((batch["pair_labels"] != IGNORE_INDEX).sum())
        counts = dict.fromkeys(self.names, tokens) | {"hard_loss": targets}
        if not self.learns_all and "soft_loss" in counts:
            counts["soft_loss"] = targets
        endings = tuple(f"_{term}_loss" for term in self.terms[1:])
        return {name: pairs if name.endswith(endings) else n for name, n in counts.items()}


def observed(
    teacher: "transformers.PreTrainedModel", layers: list[int], a: Arguments
) -> ObservedEncoder:
    """The teacher, with what of it is learnt."""
    of_attention = {*layers} if a.attention_weight else set()
    of_attention |= {relation_layer(a, teacher.config)} if a.relation_weight else set()
    return ObservedEncoder(teacher, a.objective, a.packing, bool(a.hidden_weight), of_attention)


def relation_layer(arguments: Arguments, teacher: Any) -> int:
    return arguments.relation_layer or teacher.get_text_config().num_hidden_layers


def check_pair(args: Arguments, student: Any, teacher: Any) -> list[int]:
    """For each layer of the student that of the teacher, from 1.

    Args:
        student, teacher: configurations.

    Raises:
        InputError: the two do not fit what is to be learnt.
    """
    layers, both = paired_layers(args, student, teacher), {"student": student, "teacher": teacher}
    if args.attention_weight:
        heads = [getattr(c.get_text_config(), "num_attention_heads", None) for c in both.values()]
        if heads[0] != heads[1]:
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
        if relation_layer(args, teacher) > count:
            raise InputError(
                f"relation_layer: {args.relation_layer} is not among the teacher's 1 to {count}"
            )
    return layers


@at_end
def main() -> None:
    args = parse(Arguments)
    auto_model = args.auto_model
    tokenizer = load_tokenizer(args)
    configs = [given := teacher_config(args, tokenizer), student_config(args, given, tokenizer)]
    layers = check_pair(args, configs[1], configs[0])
    with of_the_teacher():
        check_model(empty_model(configs[0], auto_model), args)
    check_model(empty_model(configs[1], auto_model), args)
    predicted = 1.0 if args.soft_weight and args.soft_tokens == "all" else args.mlm_probability
    if args.dry_run:
        phases = [(phase.sequence_length, phase.steps) for phase in args.phases]
        more = {"phases": phases, "predicted": predicted}
        print(distillation_plan(configs[1], configs[0], args, auto_model, **more))
        return
    encode, make_examples = SentenceEncoder(tokenizer), ExampleMaker(tokenizer, args)
    corpus = Corpus(args)
    args = corpus.arguments
    check_examples(args.train_sources, encode, args.objective, args)
    check_held_out(args.validation_sources, args.eval_documents, args)
    check_held_out(args.test_sources, None, args)
    folder = RunFolder(args.output_dir, args.resume)
    if folder.is_finished(args, corpus.fingerprint()):
        return

    training = Training(args, folder)
    teacher = load_teacher(args, configs[0], auto_model, training.accelerator)
    taught = observed(teacher, layers, args)

    @torch.no_grad()
    def of_teacher(batch: dict[str, torch.Tensor], **flags: Any) -> Any:
        batch = {name: tensor.to(training.accelerator.device) for name, tensor in batch.items()}
        with training.accelerator.autocast():
            return taught(**batch, **flags)

    lengths = {phase.sequence_length for phase in args.all_phases()}
    scores_of_teacher = partial(of_teacher, per_target=True)
    with of_the_teacher():
        check_objective(taught, scores_of_teacher, lengths)
        check_signals(of_teacher, teacher.config.model_type)
    model = student_model(args, configs[1], auto_model, folder.path)
    is_projected = args.hidden_weight or args.cosine_weight
    projection = add_projection(model, teacher, args.seed) if is_projected else torch.nn.Identity()
    objective = DistillationLoss(model, taught, projection, layers, args)
    flops = {}
    for length in lengths:
        both = [flops_per_token(config, length, auto_model, predicted) for config in configs]
        flops[length] = both[0] / 3 + both[1]  # of a forward pass alone, and of both
    lanes = Lanes(corpus, encode)
    rows_of = partial(example_rows, lanes, make_examples, args.phase_rows(), args.packing)
    training.prepare(
        objective,
        model,
        tokenizer,
        TrainingStream(lanes, rows_of, args),
        flops_per_token=lambda step: flops[args.phase_at(step - 1).sequence_length],
    )
    scores = partial(training.forward, per_target=True)
    check_objective(objective, scores, lengths)
    check_signals(training.forward, model.config.model_type)
    evaluation = MaskedEvaluation(training, encode, make_examples, scores, args.packing)
    for step in training.steps():
        if training.evaluates():
            training.record_evaluation(evaluation.validation(step))
        if args.phase_at(step) != args.phase_at(step - 1):
            forget_losses(training.state)  # losses of another length
    if training.stopped:
        return

    whole_count, count = (f"{parameter_count(c, auto_model)['total']:,}" for c in configs)
    facts = {"parameters": count, "parameters of the teacher": whole_count}
    if args.test_sources:
        results = evaluation.test()
        theirs = results and replace(evaluation, scores=scores_of_teacher).test()
        if theirs is None:
            return training.stop()
        results |= {name.replace("eval_", "teacher_"): value for name, value in theirs.items()}
        training.record_test(results)
        facts |= facts_of_test(results)
    facts |= facts_of_sequences(folder.records())
    conclude(training, "Encoder", "fill-mask", USAGE, facts)


if __name__ == "__main__":
    command(main)
