"""Distil a classifier, or a regression, into a smaller one: by labels, and by what a teacher says.

The teacher is whatever finetune.py or another program has left: an encoder or a decoder, with the
student's tokenizer or one of its own. It needs no labels: texts without any are read, too.

    python recipes/classification/distill.py recipes/classification/configs/distill_smoke.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml \\
        recipes/classification/distill.py recipes/classification/configs/distill_demo.yaml
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 8 \\
        recipes/classification/distill.py recipes/classification/configs/distill_mnli.yaml
    sbatch accelerate_configs/slurm_multi_node.sh \\
        recipes/classification/distill.py recipes/classification/configs/distill_mnli.yaml

The same command continues a run that was stopped. It leaves what finetune.py does, and in the card
the teacher's scores beside the student's.
"""

import signal
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import torch
import transformers
from torch.nn.functional import mse_loss

from augmentation import Augmenter
from classification_arguments import ClassificationArguments
from classification_evaluation import (
    as_facts,
    check_labels,
    evaluate,
    kept_share,
    predict,
    usage_of,
    write_predicted,
)
from classification_examples import check_tokenizer, configure
from classification_loss import ClassificationLoss
from given_labels import check_own_labels, keep_labels, teacher_labels
from labelled_texts import class_weights, read_labelled_texts
from transfer_examples import (
    Reader,
    TransferExamples,
    have_same_tokens,
    parts_of_transfer,
    transfer_labels,
)
from utils.config import InputError, at_end, command, parse
from utils.divergences import Logits, add_projection, hidden_loss, summed_losses
from utils.epochs import Epochs, Mixture, digest
from utils.memory import parameter_count
from utils.model import check_positions, load_tokenizer
from utils.model_settings import tokenizer_settings
from utils.program import say
from utils.report import conclude
from utils.run_folder import RunFolder
from utils.tables import Table, TableRow
from utils.teacher import (
    DistillationArguments,
    load_teacher,
    of_the_teacher,
    paired_layers,
    student_config,
    student_model,
    teacher_config,
)
from utils.training import Training


@dataclass
class Arguments(ClassificationArguments, DistillationArguments):
    """Distil a classifier, or a regression, into a smaller one."""

    hard_weight: float = 1.0  # of the loss of the labels, where there are any
    transfer_data: list[Table] = field(default_factory=list)  # of texts: no label is read
    # rows of train_data whose label is null, empty or in no column: refused, or as transfer_data
    on_missing_label: Literal["fail", "unlabelled"] = "fail"
    # beside each text so many that `augmentation` varies, anew in each epoch, without its label
    augmented_copies: int | None = None

    def check(self) -> None:
        super().check()
        if self.teacher.adapter_name_or_path:
            raise InputError(
                "teacher.adapter_name_or_path: the labels of a classifier stand beside its whole "
                "weights: merge the adapter (merge_adapter: true of finetune.py)"
            )
        plain = ("forward_kl", 1.0)
        if self.problem_type == "regression" and (self.divergence, self.temperature) != plain:
            raise InputError("divergence and temperature: a regression has no probabilities")
        if self.augmented_copies is not None and self.augmented_copies < 1:
            raise InputError(f"augmented_copies must be at least 1, not {self.augmented_copies}")
        if self.augmented_copies and not self.augmentation:
            raise InputError("augmented_copies: give augmentation too, which makes them")

    def fixed(self) -> dict[str, Any]:
        return super().fixed() | {"augmented_copies": self.copies}

    @property
    def copies(self) -> int:
        return (self.augmented_copies or 1) if self.augmentation else 0

    def of_teacher(self) -> "Arguments":
        """With its own tokenizer, if it has one."""
        path = self.teacher.model_name_or_path
        own = path or self.tokenizer_name
        with suppress(OSError):  # there is nothing at all, which is said where it is to be read
            own = own if own and tokenizer_settings(own) else self.tokenizer_name
        own = own if own != path else None
        return replace(super().of_teacher(), tokenizer=own, new_head=False)

    def lacks_label(self, split: str, row: TableRow) -> bool:
        """Whether a row counts as one without a label.

        Raises:
            InputError: a row of train_data has none, and that was not said.
        """
        if split != "train":
            return split == "transfer"
        may_lack = self.on_missing_label == "unlabelled"
        value = (row.find if may_lack else row.get)(self.label_column)
        # of several labels in a text, an empty one says that there are none
        is_blank = isinstance(value, str) and not value.strip() and not self.label_separator
        is_lacking = value is None or is_blank
        if is_lacking and not may_lack:
            raise InputError(
                f"{row.place}: {self.label_column} is missing: set on_missing_label: unlabelled, "
                "or give texts without labels as transfer_data"
            )
        return is_lacking


class DistillationLoss(ClassificationLoss):
    """Σ of the divergence from the teacher, of the labels' loss, and of hidden states.

    Of several labels it is the mean of the divergences of each yes or no, of a regression the
    squared difference. The teacher is no part of this module: `train()`, an optimizer and what
    wraps the module do not reach it.

    Args:
        layers: of the teacher, beside each of the student's: as `paired_layers` gives them.
    """

    def __init__(
        self,
        model: Any,
        teacher: Any,
        arguments: Arguments,
        label_weights: list[float] | None = None,
        layers: list[int] | None = None,
    ):
        a = arguments
        super().__init__(model, a.problem_type, label_weights, a.label_smoothing)
        self.teacher, self.divergence, self.layers = partial(teacher), a.as_divergence, layers
        self.weights = {"soft_loss": a.soft_weight, "hard_loss": a.hard_weight}
        if a.hidden_weight:
            self.projection = add_projection(model, teacher, a.seed)
            self.weights["hidden_loss"] = a.hidden_weight
        self.names = (*self.weights,)

    def forward(
        self,
        labels: torch.Tensor,
        weights: torch.Tensor,
        row_weights: torch.Tensor,
        predict: bool = False,
        by_teacher: bool = False,
        **inputs: torch.Tensor,
    ) -> Any:
        """
        Args:
            weights: of the labels, 0 where there is none; row_weights: 0 where there is no text;
                (rows,), as labels, which are also (rows, labels).
            inputs: (rows, tokens), by the names that the models have for them; those of a teacher
                that reads otherwise with teacher_ before them.

        Returns:
            {name: the sum of its losses}, or if `predict` the logits, (rows, labels).
        """
        prefix = "teacher_" if "teacher_input_ids" in inputs else ""
        seen = {n[len(prefix) :]: x for n, x in inputs.items() if n.startswith(prefix)}
        inputs = {n: x for n, x in inputs.items() if not n.startswith("teacher_")}
        if predict:
            return (self.teacher(**seen) if by_teacher else self.model(**inputs)).logits.float()
        with_layers = {"output_hidden_states": True} if self.layers else {}
        with torch.no_grad():
            taught = self.teacher(**seen, **with_layers)
        found = self.model(**inputs, **with_layers)
        logits = found.logits.float()
        losses = {
            "soft_loss": self.soft_loss(logits, taught.logits.float(), row_weights),
            "hard_loss": (weights * self.label_losses(logits, labels)).sum(),
        }
        if self.layers:
            is_text = inputs["attention_mask"] * row_weights[:, None] > 0
            layers = (found.hidden_states, taught.hidden_states, self.layers)
            losses["hidden_loss"] = hidden_loss(*layers, self.projection, is_text)
        return losses

    def soft_loss(
        self, logits: torch.Tensor, of_teacher: torch.Tensor, row_weights: torch.Tensor
    ) -> torch.Tensor:
        """(rows, labels), (rows, labels), (rows,) → the sum"""
        if self.problem_type == "regression":
            return (mse_loss(logits, of_teacher, reduction="none").mean(1) * row_weights).sum()
        if self.problem_type == "multi_label_classification":
            count = logits.shape[1]
            # the probabilities of (z, 0) are those of yes and no
            logits, of_teacher = (
                torch.stack([z, torch.zeros_like(z)], 2).flatten(0, 1) for z in (logits, of_teacher)
            )
            row_weights = row_weights.repeat_interleave(count) / count
        student, teacher = Logits(logits), Logits(of_teacher)
        return summed_losses(student, None, teacher, self.divergence, row_weights)[1]

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        # a label weighs the same whether its step has many or few: by all texts
        texts = int(batch["row_weights"].sum())
        found = {"soft_loss": texts, "hard_loss": texts}
        if self.layers:
            tokens = batch["attention_mask"] * batch["row_weights"][:, None]
            found["hidden_loss"] = int(tokens.sum())
        return found


@at_end
def main() -> None:
    args = parse(Arguments)
    tables = {"train": args.train_data, "validation": args.validation_data, "test": args.test_data}
    tables["transfer"] = args.transfer_data
    rows = read_labelled_texts(tables, args, args.lacks_label)
    with of_the_teacher():
        teacher_tokenizer = load_tokenizer(args.of_teacher())
    tokenizer = load_tokenizer(args)
    of_teacher = teacher_config(args, teacher_tokenizer)
    # the names also of rows that are held out of the training rows
    given = teacher_labels(of_teacher, args)
    rows, names = keep_labels(rows, given, args, of_teacher=True)
    if given is None:
        configure(of_teacher, names, args.problem_type, {})
    with of_the_teacher():
        check_tokenizer(teacher_tokenizer, of_teacher, args.sequence_length)
    config = student_config(args, of_teacher, tokenizer)
    check_own_labels(config, args, names)
    needing = [
        name
        for name in ("student_layers", "student_intermediate_size", "hidden_weight")
        if getattr(args, name)
    ]
    if needing and not have_same_tokens(tokenizer, teacher_tokenizer):
        raise InputError(
            f"{needing[0]}: {args.tokenizer_name} is not the tokenizer of the teacher: leave it out"
        )
    check_tokenizer(tokenizer, config, args.sequence_length)
    configure(config, names, args.problem_type, args.dropout)
    layers = paired_layers(args, config, of_teacher) if args.hidden_weight else None
    rows, leaks = parts_of_transfer(rows, args)
    labels, labelled = transfer_labels(rows, names, args)
    check_labels(labels, args)
    weights = class_weights(names, labels["train"][:labelled], args)
    reader, examples, cut = Reader(tokenizer, teacher_tokenizer), {}, {}
    for split, found in rows.items():
        examples[split], cut[split] = reader.read(found, labels[split])
    transfer = examples["train"] * (1 + args.copies)
    mixture = Mixture(transfer, args)
    args = args.for_examples(mixture.count)
    fingerprint = {
        "the training data": digest((row.texts, row.label) for row in rows["train"]),
        "the tokenizer": digest(example["input_ids"].tobytes() for example in examples["train"]),
        "the teacher's tokenizer": digest(
            example.get("teacher", example)["input_ids"].tobytes() for example in examples["train"]
        ),
    }
    folder = RunFolder(args.output_dir, args.resume)
    if folder.is_finished(args, fingerprint["the training data"]):
        return

    training = Training(args, folder)
    auto_model = transformers.AutoModelForSequenceClassification
    teacher = load_teacher(args, of_teacher, auto_model, training.accelerator)
    model = student_model(args, config, auto_model, folder.path, of_teacher)
    check_positions(model, args.sequence_length)
    with of_the_teacher():
        check_positions(teacher, args.sequence_length)
    objective = DistillationLoss(model, teacher, args, weights, layers)
    varied = rows["train"] * (1 + args.copies)
    augmenter = Augmenter(varied, args.augmentation, args.seed) if args.augmentation else None
    step_weights = None if args.is_multi_label else weights
    make = TransferExamples(examples["train"], labelled, step_weights, augmenter, reader.encode)
    to_batch = partial(reader.collate, label=labels["train"][0])
    facts = {
        "labels": ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else ""),
        "examples": ", ".join(f"{len(found):,} {split}" for split, found in rows.items()),
        "train": f"{labelled:,} with a label, {len(transfer) - len(rows['train']):,} varied copies",
        "cut to sequence_length": ", ".join(f"{n:,} {split}" for split, n in cut.items()),
        **leaks,
        "parameters": f"{parameter_count(config, auto_model)['total']:,}",
        "parameters of the teacher": f"{parameter_count(of_teacher, auto_model)['total']:,}",
    }
    steps = Epochs(mixture, to_batch, fingerprint, args, vary=make)
    training.prepare(objective, model, tokenizer, steps)
    say("\n".join(f"{name}: {value}" for name, value in facts.items()))
    for _ in training.steps():
        if training.evaluates():
            results: dict[str, Any] | None = {}
            if examples["validation"]:
                logits = predict(training, examples["validation"], to_batch)
                results = evaluate(training, logits, labels["validation"], rows["validation"])
            training.record_evaluation(results)
    if training.stopped:
        return

    training.load_best()
    split = "test" if examples["test"] else "validation"
    if examples[split]:
        logits = predict(training, examples[split], to_batch)
        results = evaluate(training, logits, labels[split], rows[split])
        taught = results and predict(training, examples[split], to_batch, by_teacher=True)
        taught = evaluate(training, taught, labels[split], rows[split])
        if taught is None:
            return training.stop()
        if split == "test":
            named = {k.replace("eval_", "teacher_"): value for k, value in taught.items()}
            training.record_test(results | named)
        facts |= as_facts(results, split) | as_facts(taught, split, " by the teacher")
        facts |= kept_share(args, results, taught)
        facts |= write_predicted(training, rows[split], names, logits, labels[split])
    facts |= mixture.facts
    conclude(training, "Distilled text classifier", "text-classification", usage_of(args), facts)


if __name__ == "__main__":
    command(main)
