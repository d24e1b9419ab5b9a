"""Fine-tune a model to classify texts: one label, several labels, or a number (regression).

Encoders and decoders; single texts and pairs; all weights, a part of them, or LoRA:

    python recipes/classification/finetune.py recipes/classification/configs/finetune_smoke.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml \\
        recipes/classification/finetune.py recipes/classification/configs/finetune_demo.yaml
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 8 \\
        recipes/classification/finetune.py recipes/classification/configs/finetune_mnli.yaml
    sbatch accelerate_configs/slurm_multi_node.sh \\
        recipes/classification/finetune.py recipes/classification/configs/finetune_mnli.yaml

The same command continues a run that was stopped. Besides what every run writes there are
predictions.jsonl, of the test data in their order, and plots of the errors and the calibration.
"""

import signal
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import transformers

from adversarial import Adversarial
from augmentation import Augmenter
from classification_arguments import ClassificationArguments
from classification_evaluation import (
    as_facts,
    check_labels,
    evaluate,
    predict,
    usage_of,
    write_predicted,
)
from classification_examples import (
    TrainingExamples,
    check_tokenizer,
    collate,
    configure,
    labelled_examples,
)
from classification_loss import ClassificationLoss
from given_labels import given_labels, keep_labels
from labelled_texts import class_weights, label_ids, read_labelled_texts
from utils.adapters import AdapterArguments, task_model, trainable_share
from utils.config import InputError, at_end, command, parse
from utils.epochs import Epochs, Mixture, digest, hold_out
from utils.model import check_positions, load_tokenizer, model_config
from utils.program import say
from utils.report import conclude
from utils.run_folder import RunFolder
from utils.training import Training


@dataclass
class Arguments(ClassificationArguments, AdapterArguments):
    """Fine-tune a model to classify texts: one label, several labels, or a number."""

    merge_adapter: bool = True  # the head of a classifier is no part of any base model
    adversarial: Adversarial | None = None

    def check(self) -> None:
        super().check()
        if self.adversarial is not None:
            self.adversarial.check(self.mixed_precision)
            if self.torch_compile:
                raise InputError(
                    "torch_compile: what is compiled cannot be perturbed: leave it out"
                )

    def fixed(self) -> dict[str, Any]:
        return super().fixed() | {"adversarial": asdict(self)["adversarial"]}


@at_end
def main() -> None:
    args = parse(Arguments)
    tables = {"train": args.train_data, "validation": args.validation_data, "test": args.test_data}
    rows = read_labelled_texts(tables, args)
    tokenizer = load_tokenizer(args)
    config = model_config(args, tokenizer)
    # the names also of rows that are held out of the training rows
    rows, names = keep_labels(rows, given_labels(config, args), args)
    parts, leaks = hold_out([*rows.values()], attrgetter("texts"), args)
    rows = dict(zip(tables, parts, strict=True))
    labels = {split: label_ids(found, names, args) for split, found in rows.items()}
    check_labels(labels, args)
    weights = class_weights(names, labels["train"], args)
    check_tokenizer(tokenizer, config, args.sequence_length)
    configure(config, names, args.problem_type, args.dropout)
    examples, cut = {}, {}
    for split in tables:
        examples[split], cut[split] = labelled_examples(tokenizer, rows[split], labels[split])
    mixture = Mixture(examples["train"], args)
    args = args.for_examples(mixture.count)
    fingerprint = {
        "the training data": digest((row.texts, row.label) for row in rows["train"]),
        "the tokenizer": digest(example["input_ids"].tobytes() for example in examples["train"]),
    }
    folder = RunFolder(args.output_dir, args.resume)
    if folder.is_finished(args, fingerprint["the training data"]):
        return

    training = Training(args, folder)
    model, trained = task_model(
        args, config, transformers.AutoModelForSequenceClassification, "SEQ_CLS", folder.path
    )
    check_positions(model, args.sequence_length)
    objective = ClassificationLoss(
        model, args.problem_type, weights, args.label_smoothing, args.adversarial
    )
    augmenter = (
        Augmenter(rows["train"], args.augmentation, args.seed) if args.augmentation else None
    )
    step_weights = None if args.is_multi_label else weights
    make = TrainingExamples(examples["train"], tokenizer, step_weights, augmenter, args.seed)
    to_batch = partial(collate, pad_token_id=tokenizer.pad_token_id, label=labels["train"][0])
    facts = {
        "labels": ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else ""),
        "examples": ", ".join(f"{len(found):,} {split}" for split, found in rows.items()),
        "cut to sequence_length": ", ".join(f"{n:,} {split}" for split, n in cut.items()),
        **leaks,
        "trained": trainable_share(trained),
    }
    training.prepare(
        objective,
        trained,
        tokenizer,
        Epochs(mixture, to_batch, fingerprint, args, vary=make),
    )
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
        if results is None:
            return training.stop()
        if split == "test":
            training.record_test(results)
        facts |= as_facts(results, split)
        facts |= write_predicted(training, rows[split], names, logits, labels[split])
    # an adapter alone takes them from its base model
    known = f", id2label={model.config.id2label}, problem_type={args.problem_type!r}"
    is_adapter = args.has_adapter and not args.merge_adapter
    usage = usage_of(args, known if is_adapter else "")
    facts |= mixture.facts
    conclude(training, "Text classifier", "text-classification", usage, facts)


if __name__ == "__main__":
    command(main)
