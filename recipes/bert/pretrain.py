"""Pretrain an encoder on a stream of raw text: masked tokens, and pairs of segments.

BERT (masked language modelling, MLM, and next-sentence prediction, NSP), ALBERT (MLM and
sentence-order prediction) or RoBERTa (MLM alone), on one process, eight GPUs, several nodes:

    python recipes/bert/pretrain.py recipes/bert/configs/pretrain_smoke.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml \\
        recipes/bert/pretrain.py recipes/bert/configs/pretrain_demo.yaml
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 8 \\
        recipes/bert/pretrain.py recipes/bert/configs/pretrain_base_slimpajama.yaml
    sbatch accelerate_configs/slurm_multi_node.sh \\
        recipes/bert/pretrain.py recipes/bert/configs/pretrain_large_slimpajama.yaml

The same command continues a run that was stopped; `--dry_run true` prints the plan instead.
"""

import signal
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import torch
import transformers
from torch.nn.functional import cross_entropy

from example_rows import block_diagonal_mask, check_examples, example_rows
from masked_check import check_objective
from masked_evaluation import MaskedEvaluation
from masking import ExampleMaker, MaskingArguments
from sentence_encoder import SentenceEncoder
from utils.arguments import TrainingArguments
from utils.config import InputError, at_end, command, parse
from utils.lanes import Corpus, Lanes, StreamArguments
from utils.loss import IGNORE_INDEX
from utils.memory import PAIR_HEADS, flops_per_token, parameter_count, plan
from utils.model import (
    ModelArguments,
    build_model,
    check_positions,
    empty_model,
    first_position,
    load_tokenizer,
    model_config,
    optional_inputs,
)
from utils.report import conclude
from utils.run_folder import RunFolder
from utils.sources import Source, check_held_out, held_out_documents
from utils.stream import TrainingStream
from utils.training import Training

USAGE = """
from transformers import pipeline

fill = pipeline("fill-mask", "{model}")
print(fill(f"the sum of two {fill.tokenizer.mask_token}.")[0]["sequence"])
"""


@dataclass
class Phase:
    """A part of the run with its own length."""

    sequence_length: int
    steps: int
    per_device_batch_size: int | None = None  # null: that of the run


@dataclass
class Arguments(TrainingArguments, StreamArguments, MaskingArguments, ModelArguments):
    """Pretrain an encoder on a stream of raw text: masked tokens, and pairs of segments."""

    model: dict[str, Any] = field(default_factory=lambda: {"model_type": "bert"})
    sequence_length: int = 512  # tokens of a row; with phases, that of the last
    phases: list[Phase] = field(default_factory=list)  # their steps add up to max_steps
    packing: bool = True  # several sequences a row, which do not see each other; false: padding
    validation_sources: list[Source] = field(default_factory=list)  # each read once
    test_sources: list[Source] = field(default_factory=list)  # read once, at the end of the run
    eval_documents: int | None = None  # of each validation source; null: all
    pseudo_perplexity_documents: int = 0  # of each domain of the test, token by token: slow
    dry_run: bool = False  # print parameters, tokens, FLOPs and memory, and load nothing

    def check(self) -> None:
        lengths = [phase.sequence_length for phase in self.phases]
        if self.phases:
            steps = [phase.steps for phase in self.phases]
            if min(steps) < 1:
                raise InputError(f"phases: steps must be at least 1, not {min(steps)}")
            if sum(steps) != self.max_steps:
                raise InputError(
                    f"phases: {' + '.join(map(str, steps))} steps do not add up to max_steps "
                    f"{self.max_steps}"
                )
            if lengths != sorted(lengths):
                raise InputError(f"phases: the lengths {lengths} must not become shorter")
            if self.max_tokens is not None:
                raise InputError("max_tokens: a run in phases is given its length by max_steps")
            if self.sequence_length not in (Arguments.sequence_length, self.row_length):
                raise InputError(
                    f"sequence_length: {self.sequence_length} is not the {self.row_length} of the "
                    "last of the phases: leave it out"
                )
        super().check()
        for size in {phase.per_device_batch_size for phase in self.phases} - {None}:
            self.check_batch(size)
        self.check_length(min([self.row_length, *lengths]))
        if self.eval_documents is not None and self.eval_documents < 1:
            raise InputError(f"eval_documents must be at least 1, not {self.eval_documents}")
        if self.validation_sources:
            terms = self.objective.split("_")
            parts = [f"eval_{term}_{what}" for term in terms for what in ("loss", "accuracy")]
            self.check_metric(["eval_loss", *parts])
        if self.pseudo_perplexity_documents and not self.test_sources:
            raise InputError("pseudo_perplexity_documents: give test_sources, of which they are")
        if self.packing and (self.attn_implementation or "").startswith("flash"):
            raise InputError(
                f"attn_implementation: {self.attn_implementation} takes no mask of packed rows: "
                "set sdpa or eager, or packing: false"
            )

    def fixed(self) -> dict[str, Any]:
        # the last phase may be made longer
        phases = [[phase.sequence_length, phase.steps] for phase in self.all_phases()[:-1]]
        return super().fixed() | {"phases": phases, "packing": self.packing}

    @property
    def row_length(self) -> int:
        return self.phases[-1].sequence_length if self.phases else self.sequence_length

    def all_phases(self) -> list[Phase]:
        return self.phases or [Phase(self.sequence_length, self.total_steps or 1)]

    def phase_at(self, step: int) -> Phase:
        """That of the step after `step` steps; the last one goes on."""
        ends = accumulate(phase.steps for phase in self.all_phases())
        phases = zip(self.all_phases(), ends, strict=True)
        return next((phase for phase, end in phases if step < end), self.all_phases()[-1])

    def micro_batch_size(self, step: int) -> int:
        return self.phase_at(step).per_device_batch_size or self.per_device_batch_size


class MaskedLoss(torch.nn.Module):
    """Σ -log p(token | what is not masked), and of the label of each pair of segments.

    The heads see the masked positions and the first token of each pair alone: the logits of all
    other positions are never computed.
    """

    def __init__(self, model: torch.nn.Module, objective: str, packing: bool):
        super().__init__()
        self.model, self.config, self.packing = model, model.config, packing
        self.terms = objective.split("_")  # mlm, and nsp or sop
        self.names = tuple(f"{term}_loss" for term in self.terms)
        self.optional, self.first_position = optional_inputs(model), first_position(model)
        if not packing:  # a model that sees its padding counts it as its clients do
            self.optional = [name for name in self.optional if name != "position_ids"]
        self.targets: torch.Tensor | None = None  # None: all hidden states are wanted
        model.base_model.register_forward_hook(self._keep_targets)

    def forward(self, per_target: bool = False, **batch: torch.Tensor) -> dict[str, Any]:
        """
        Args:
            batch: of shape (rows, sequence_length), as `example_rows.features` names them.

        Returns:
            {term_loss: its sum over the targets}, or if `per_target` {term: (the loss of each
            target, whether the most likely class is right)}, in the order of the rows.
        """
        if self.packing:
            mask = block_diagonal_mask(batch["sequence_ids"], self.config, self.model.dtype)
        else:  # columns of nothing but padding are left out
            longest = max(1, int((batch["sequence_ids"] > 0).sum(1).max()))
            batch = {name: values[:, :longest] for name, values in batch.items()}
            mask = (batch["sequence_ids"] > 0).long()
        labels, pair_labels = batch["labels"].flatten(), batch["pair_labels"].flatten()
        self.targets = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        self.firsts = (pair_labels != IGNORE_INDEX).nonzero().squeeze(1)
        batch["position_ids"] = batch["position_ids"] + self.first_position
        output = self.model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            **{name: batch[name] for name in self.optional},
        )
        targets, self.targets = self.targets, None
        pairs = output.get("seq_relationship_logits", output.get("sop_logits"))
        logits = [output.get("prediction_logits", output.get("logits"))[0], pairs]
        classes = [labels[targets], pair_labels[self.firsts]]
        found = zip(self.terms, logits, classes, strict=False)
        if per_target:
            return {
                term: (cross_entropy(x.float(), y, reduction="none"), x.argmax(1) == y)
                for term, x, y in found
            }
        return {
            f"{term}_loss": cross_entropy(x.float(), y, reduction="sum") for term, x, y in found
        }

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        labels = zip(self.names, (batch["labels"], batch["pair_labels"]), strict=False)
        return {name: int((values != IGNORE_INDEX).sum()) for name, values in labels}

    def _keep_targets(self, base_model: torch.nn.Module, _: Any, output: Any) -> Any:
        """Of the hidden states, what the heads are to see."""
        if self.targets is None:
            return output
        hidden = output.last_hidden_state.flatten(0, 1)
        output.last_hidden_state = hidden[self.targets][None]
        if len(self.terms) > 1:
            firsts = hidden[self.firsts]
            if isinstance(base_model.pooler, torch.nn.Linear):  # ALBERT, BigBird
                activation = getattr(base_model, "pooler_activation", None) or base_model.activation
                output.pooler_output = activation(base_model.pooler(firsts))
            else:
                output.pooler_output = base_model.pooler(firsts[:, None])
        return output


def check_model(model: "transformers.PreTrainedModel", args: Arguments) -> None:
    """Raises InputError when the model lacks what the objective, the length or packing needs."""
    kind = model.config.model_type
    if args.packing and "position_ids" not in optional_inputs(model):
        raise InputError(
            f"model: {kind} takes no position_ids, which packed rows need: set packing: false"
        )
    heads = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if args.objective != "mlm" and not heads & PAIR_HEADS:
        raise InputError(
            f"objective: {kind} has no head for pairs, as bert and albert have: set objective: mlm"
        )
    check_positions(model, args.row_length)


@at_end
def main() -> None:
    args = parse(Arguments)
    auto_model = (
        transformers.AutoModelForMaskedLM
        if args.objective == "mlm"
        else transformers.AutoModelForPreTraining
    )
    predicted = args.mlm_probability
    if args.dry_run:
        config = model_config(args)
        check_model(empty_model(config, auto_model), args)
        phases = [(phase.sequence_length, phase.steps) for phase in args.phases]
        print(plan(config, args, phases, auto_model, predicted))
        return
    tokenizer = load_tokenizer(args)
    config = model_config(args, tokenizer)
    encode, make_examples = SentenceEncoder(tokenizer), ExampleMaker(tokenizer, args)
    corpus = Corpus(args)
    check_examples(args.train_sources, encode, args.objective, args)
    check_held_out(args.validation_sources, args.eval_documents, args)
    check_held_out(args.test_sources, None, args)
    folder = RunFolder(args.output_dir, args.resume)
    if folder.is_finished(args, corpus.fingerprint()):
        return

    training = Training(args, folder)
    model = build_model(args, config, auto_model)
    check_model(model, args)
    objective = MaskedLoss(model, args.objective, args.packing)
    phases, per_lane = args.all_phases(), args.global_batch_size // args.lanes
    flops = {
        phase.sequence_length: flops_per_token(config, phase.sequence_length, auto_model, predicted)
        for phase in phases
    }
    rows = [(phase.sequence_length, phase.steps * per_lane) for phase in phases]
    lanes = Lanes(corpus, encode)
    rows_of = partial(example_rows, lanes, make_examples, rows, args.packing)
    training.prepare(
        objective,
        model,
        tokenizer,
        TrainingStream(lanes, rows_of, args),
        flops_per_token=lambda step: flops[args.phase_at(step - 1).sequence_length],
    )
    scores = partial(training.forward, per_target=True)
    check_objective(objective, scores, {*flops})
    evaluation = MaskedEvaluation(training, encode, make_examples, scores, args.packing)
    for step in training.steps():
        if training.evaluates():
            results: dict[str, Any] | None = {}
            if args.validation_sources:
                length = args.phase_at(max(step - 1, 0)).sequence_length
                documents = held_out_documents(args.validation_sources, args.eval_documents, args)
                results = evaluation.loss_and_accuracy(documents, length)
            training.record_evaluation(results)
        if args.phase_at(step) != args.phase_at(step - 1):
            training.state.forget()  # losses of another length
    if training.stopped:
        return

    facts = {"parameters": f"{parameter_count(config, auto_model)['total']:,}"}
    if args.test_sources:
        length = args.row_length
        documents = partial(held_out_documents, args.test_sources, None, args)
        results = evaluation.loss_and_accuracy(documents(), length)
        if results is not None and args.pseudo_perplexity_documents:
            count = args.pseudo_perplexity_documents
            more = evaluation.pseudo_perplexity(documents(), count, length)
            results = None if more is None else results | more
        if results is None:
            return training.stop()
        training.record_test(results)
        facts |= {
            f"{name.removeprefix('eval_').replace('_', ' ')} of the test documents": f"{value:.4f}"
            for name, value in results.items()
            if isinstance(value, float)
        }
    logged = (r["sequence_counts"] for r in reversed(folder.records()) if "sequence_counts" in r)
    facts |= {name.replace("_", " "): f"{count:,}" for name, count in next(logged, {}).items()}
    conclude(training, "Encoder", "fill-mask", USAGE, facts)


if __name__ == "__main__":
    command(main)
