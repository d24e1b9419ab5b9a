"""Fine-tune an encoder to find the answer to a question in a text: SQuAD, with or without "none".

One CPU process, two, eight GPUs:

    python recipes/question_answering/finetune.py \\
        recipes/question_answering/configs/finetune_smoke.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml \\
        recipes/question_answering/finetune.py \\
        recipes/question_answering/configs/finetune_demo.yaml
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 8 \\
        recipes/question_answering/finetune.py \\
        recipes/question_answering/configs/finetune_squad_v2.yaml

The same command continues a run that was stopped.
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import torch
import transformers
from torch.nn.functional import cross_entropy

from answers import (
    Prediction,
    Window,
    best_answers,
    best_spans,
    check_tokenizer,
    collate_windows,
    make_windows,
)
from questions import Question, QuestionColumns, check_unanswerable, read_questions
from squad_metrics import prediction_record, results_of
from utils.adapters import AdapterArguments, task_model, trainable_share
from utils.arguments import FinetuningArguments
from utils.config import InputError, at_end, command, parse
from utils.epochs import Epochs, Mixture, digest, hold_out
from utils.loss import IGNORE_INDEX
from utils.model import check_positions, load_tokenizer, model_config, optional_inputs
from utils.report import conclude
from utils.run_folder import RunFolder
from utils.scoring import by_domain, check_finite, score_examples, write_predictions
from utils.training import Training

USAGE = """
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}")
model = AutoModelForQuestionAnswering.from_pretrained("{model}")
question, context = "Where is the treasure?", "Gold lies in the cave behind the fall."
inputs = tokenizer(question, context, truncation="only_second", return_tensors="pt")
with torch.no_grad():
    output = model(**inputs)
spans = output.start_logits[0][:, None] + output.end_logits[0][None, :]
in_context = torch.tensor([part == 1 for part in inputs.sequence_ids()])
spans = spans.masked_fill(~(in_context[:, None] & in_context[None, :]).triu(), -torch.inf)
start, end = divmod(int(spans.argmax()), len(spans))
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))
"""


@dataclass
class Arguments(FinetuningArguments, AdapterArguments, QuestionColumns):
    """Fine-tune an encoder to find the answer to a question in a text."""

    model: dict[str, Any] = field(default_factory=lambda: {"model_type": "bert"})
    # tokens of a window: the question and a part of the context; global_batch_size counts windows
    sequence_length: int = 384
    doc_stride: int = 128  # tokens of the context that a window shares with the one before it
    max_answer_length: int = 30  # tokens of a prediction, at most
    n_best_size: int = 20  # answers of each question in predictions.jsonl
    # no answer, where it scores higher than the best span by more than this; null: in the test what
    # gives the best F1 on the validation data, else 0
    null_score_diff_threshold: float | None = None

    def check(self) -> None:
        super().check()
        for name in ("max_answer_length", "n_best_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.doc_stride < self.sequence_length:
            raise InputError(
                f"doc_stride must be at least 0 and less than sequence_length "
                f"{self.sequence_length}, not {self.doc_stride}"
            )

    def fixed(self) -> dict[str, Any]:
        return super().fixed() | {"doc_stride": self.doc_stride}


class SpanLoss(torch.nn.Module):
    """-log p(first token of the answer) / 2 - log p(last token) / 2, summed over the windows.

    The distributions are over the tokens of the context and [CLS], as they are in prediction.
    """

    names = ("loss",)

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.takes_types = "token_type_ids" in optional_inputs(model)

    def forward(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        is_candidate: torch.Tensor,
        start_positions: torch.Tensor,
        end_positions: torch.Tensor,
        per_window: bool = False,
    ) -> Any:
        """
        Args:
            batch: as `collate_windows` makes it.

        Returns:
            {"loss": the sum over the windows with a target}, or if `per_window` (loss (rows,),
            start logits, end logits (rows, longest window)).
        """
        types = {"token_type_ids": token_type_ids} if self.takes_types else {}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        nowhere = torch.finfo(torch.float32).min
        logits = [
            scores.float().masked_fill(~is_candidate, nowhere)
            for scores in (output.start_logits, output.end_logits)
        ]
        targets = zip(logits, (start_positions, end_positions), strict=True)
        losses = [
            cross_entropy(x, y, ignore_index=IGNORE_INDEX, reduction="none") for x, y in targets
        ]
        loss = (losses[0] + losses[1]) / 2
        return (loss, *logits) if per_window else {"loss": loss.sum()}

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        return {"loss": int((batch["start_positions"] != IGNORE_INDEX).sum())}


def evaluate(
    training: Training,
    collate: Callable[[list[Window]], dict[str, torch.Tensor]],
    questions: list[Question],
    windows: list[Window],
    args: Arguments,
) -> list[Prediction] | None:
    """The predictions, with the losses of their windows; None when a signal interrupts."""

    def score(indices: list[int]) -> list[tuple]:
        of_batch = [windows[index] for index in indices]
        losses, *logits = training.forward(collate(of_batch), per_window=True)
        logits = (values.cpu().numpy() for values in logits)
        return [
            (loss, *best_spans(window, start, end, args.max_answer_length, args.n_best_size))
            for window, loss, start, end in zip(of_batch, losses.tolist(), *logits, strict=False)
        ]

    results = score_examples(training, windows, score, "answering")
    if results is None:
        return None
    check_finite([(loss, no_answer) for loss, no_answer, _ in results])
    found = [(no_answer, spans) for _, no_answer, spans in results]
    losses: list[list[float]] = [[] for _ in questions]
    for window, (loss, *_) in zip(windows, results, strict=True):
        if window["start"] != IGNORE_INDEX:
            losses[window["question"]].append(loss)
    best = best_answers(questions, windows, found, args.n_best_size)
    return [one._replace(losses=own) for one, own in zip(best, losses, strict=True)]


def results_by_table(
    questions: list[Question], predictions: list[Prediction], threshold: float | None
) -> dict[str, Any]:
    """`results_of` all questions and, where there are several, of those of each table."""

    def measure(indices: list[int]) -> dict[str, float]:
        asked, given = ([part[i] for i in indices] for part in (questions, predictions))
        return results_of(asked, given, threshold)

    return by_domain([question.table for question in questions], measure)


def check_metric(args: Arguments, validation: list[Question], threshold: float | None) -> None:
    """Raises InputError unless an evaluation will give metric_for_best_model."""
    if validation:
        nothing = [Prediction("", 0.0, [])] * len(validation)
        args.check_metric(results_of(validation, nothing, threshold))


def threshold_of(training: Training) -> float:
    """What gave the best F1 on the validation data, with the weights that are tested."""
    name, best_step = "eval_best_f1_threshold", training.state.best_step
    records = [record for record in training.folder.records() if name in record]
    if training.arguments.load_best_model_at_end:
        records = [record for record in records if record["step"] == best_step]
    return records[-1][name] if records else 0.0


@at_end
def main() -> None:
    args = parse(Arguments)
    # what is exported reads a [SEP] in a question as it is read here: as text
    tokenizer = load_tokenizer(args, split_special_tokens=True)
    check_tokenizer(tokenizer)
    config = model_config(args, tokenizer)
    tables = (args.train_data, args.validation_data, args.test_data)
    parts = [read_questions(part, args) for part in tables]
    (train, validation, test), leaks = hold_out(parts, attrgetter("text", "context"), args)
    has_unanswerable = check_unanswerable(train, validation + test)
    threshold = (args.null_score_diff_threshold or 0.0) if has_unanswerable else None
    check_metric(args, validation, threshold)
    fingerprint = {
        "the training data": digest(question[:4] for question in train),
        "the tokenizer": digest([tokenizer.backend_tokenizer.to_str()]),
    }
    windows_of = partial(
        make_windows,
        tokenizer=tokenizer,
        sequence_length=args.sequence_length,
        doc_stride=args.doc_stride,
    )
    collate = partial(collate_windows, padding=tokenizer.pad_token_id or 0)
    windows = windows_of(train)
    cut = {window["question"] for window in windows if window["start"] == IGNORE_INDEX}
    # they would teach that there is no answer where there is one
    windows = [window for window in windows if window["start"] != IGNORE_INDEX]
    if not windows:
        raise InputError(
            "train_data: no window holds a whole answer: raise sequence_length, or doc_stride"
        )
    validation_windows = windows_of(validation, keep_offsets=True)
    test_windows = windows_of(test, keep_offsets=True)
    mixture = Mixture(windows, args)
    args = args.for_examples(mixture.count)
    folder = RunFolder(args.output_dir, args.resume)
    if folder.is_finished(args, fingerprint["the training data"]):
        return

    training = Training(args, folder)
    model, trained = task_model(
        args, config, transformers.AutoModelForQuestionAnswering, "QUESTION_ANS", folder.path
    )
    check_positions(model, args.sequence_length)
    objective = SpanLoss(model)
    training.prepare(
        objective,
        trained,
        tokenizer,
        Epochs(mixture, lambda rows: collate([*chain(*rows)]), fingerprint, args),
    )
    for _ in training.steps():
        if training.evaluates() and validation:
            found = evaluate(training, collate, validation, validation_windows, args)
            training.record_evaluation(found and results_by_table(validation, found, threshold))
    if training.stopped:
        return

    facts = {
        "trained": trainable_share(trained),
        "questions": f"{len(train):,} in {len(windows):,} windows",
        **leaks,
        **mixture.facts,
    }
    if cut:
        facts["questions left out: no window holds the whole answer"] = f"{len(cut):,}"
    if test:
        training.load_best()
        found = evaluate(training, collate, test, test_windows, args)
        if found is None:
            return training.stop()
        if has_unanswerable and args.null_score_diff_threshold is None:
            threshold = threshold_of(training)
        results = results_by_table(test, found, threshold)
        training.record_test(results)
        for name, key in {"exact match": "exact_match", "F1": "f1"}.items():
            facts[f"{name} of the test questions"] = f"{results[f'eval_{key}']:.2f}"
        if has_unanswerable:
            facts["no-answer threshold of the test"] = f"{threshold:.4f}"
            share = sum(not question.answers for question in test) / len(test)
            facts["exact match and F1 if no question were answered"] = f"{100 * share:.2f}"
        with training.ranks.together():
            if training.is_main:
                pairs = zip(test, found, strict=True)
                records = (prediction_record(*pair, threshold) for pair in pairs)
                write_predictions(folder.path / "predictions.jsonl", records)
    conclude(training, "Extractive question answering", "question-answering", USAGE, facts)


if __name__ == "__main__":
    command(main)
