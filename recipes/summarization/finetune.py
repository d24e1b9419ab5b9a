"""Fine-tune a model to write a text from a text: summaries, translations.

With an encoder-decoder (T5, BART, Marian) or a decoder alone (GPT-2, Llama), on one CPU process,
two, eight GPUs:

    python recipes/summarization/finetune.py recipes/summarization/configs/finetune_smoke.yaml
    accelerate launch --config_file accelerate_configs/multi_cpu.yaml \\
        recipes/summarization/finetune.py recipes/summarization/configs/finetune_demo.yaml
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 8 \\
        recipes/summarization/finetune.py recipes/summarization/configs/finetune_cnn_dailymail.yaml

The same command continues a run that was stopped.
"""

import math
import signal
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import attrgetter
from textwrap import shorten
from typing import Any, Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback

import torch
import transformers
from torch.nn.functional import cross_entropy, pad

from text_generation import (
    GenerationArguments,
    generate,
    generation_config,
    settle_tokens,
    usage,
)
from text_metrics import ROUGE, first_sentences, signatures, text_scores
from text_pairs import (
    Example,
    Pair,
    PairArguments,
    PairEncoder,
    check_ids,
    check_tokenizer,
    decoder_inputs,
    own_prefix,
    read_pairs,
)
from utils.adapters import AdapterArguments, task_model, trainable_share
from utils.arguments import FinetuningArguments
from utils.config import InputError, at_end, command, parse
from utils.epochs import Epochs, Mixture, digest, hold_out
from utils.loss import IGNORE_INDEX, LEAK, amplified
from utils.model import empty_model, load_tokenizer, model_config
from utils.report import conclude
from utils.run_folder import RunFolder
from utils.scoring import by_domain, check_finite, score_examples, write_predictions
from utils.tables import naming_failures
from utils.training import Training


@dataclass
class Arguments(FinetuningArguments, PairArguments, GenerationArguments, AdapterArguments):
    """Fine-tune a model to write a text from a text: summaries, translations."""

    model: dict[str, Any] = field(default_factory=lambda: {"model_type": "t5"})
    sequence_length: int | None = None  # follows: max_source_length + max_target_length
    label_smoothing_factor: float = 0.0  # of the probability, spread over the vocabulary
    metrics: list[Literal["rouge", "bleu", "chrf"]] = field(default_factory=lambda: ["rouge"])
    # the first ones of validation_data, for which texts are generated; 0: the loss alone; null: all
    eval_generate_examples: int | None = None
    lead_sentences: int = 0  # of the test's sources: a baseline beside the scores; 0: none

    def check(self) -> None:
        super().check()
        if self.sequence_length not in (None, self.row_length):
            raise InputError(
                f"sequence_length: {self.sequence_length} is not the {self.row_length} of "
                "max_source_length and max_target_length: leave it out"
            )
        if not 0 <= self.label_smoothing_factor < 1:
            raise InputError(
                f"label_smoothing_factor must be in [0, 1), not {self.label_smoothing_factor}"
            )
        for name in ("eval_generate_examples", "lead_sentences"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.has_validation:
            self.check_metric(self.measured())

    def fixed(self) -> dict[str, Any]:
        return super().fixed() | {"label_smoothing_factor": self.label_smoothing_factor}

    @property
    def row_length(self) -> int:
        return self.max_source_length + self.max_target_length

    @property
    def new_tokens(self) -> int:
        """Of a text that is generated, at most."""
        return self.max_new_tokens or self.max_target_length

    @property
    def task(self) -> str:
        return "summarization" if "rouge" in self.metrics else "translation"

    def measured(self) -> list[str]:
        """What evaluations give."""
        scores = [
            score
            for name in self.metrics
            for score in (ROUGE if name == "rouge" else (name,))
            if self.eval_generate_examples != 0
        ]
        return ["eval_loss", *(f"eval_{score}" for score in scores)]


class TargetLoss(torch.nn.Module):
    """Σ -log p(token | source, the target before it), over the tokens of the targets."""

    names = ("loss",)

    def __init__(self, model: torch.nn.Module, label_smoothing_factor: float = 0.0):
        super().__init__()
        self.model, self.label_smoothing_factor = model, label_smoothing_factor

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        per_example: bool = False,
    ) -> Any:
        """
        Args:
            batch: as `PairEncoder.collate` makes it.

        Returns:
            {"loss": the sum}, with label smoothing; or that of each row without, if `per_example`.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.model.config.is_encoder_decoder:
            is_target = labels != IGNORE_INDEX
            # mBART looks for the last token, which a row without a target does not have
            any_token = int(self.model.config.pad_token_id == 0)
            known = labels.masked_fill(~is_target.any(1, keepdim=True), any_token)
            shifted = decoder_inputs(self.model, known)
            logits = self.model(**inputs, decoder_input_ids=shifted).logits[is_target]
        else:
            labels = pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
            is_target = labels != IGNORE_INDEX
            # of the prompt, most of the tokens, no logits are computed
            head = self.model.get_output_embeddings()
            hook = head.register_forward_pre_hook(lambda _, x: (x[0][is_target][None],))
            try:
                logits = self.model(**inputs).logits[0]
            finally:
                hook.remove()
        losses = cross_entropy(
            logits.float(),
            labels[is_target],
            reduction="none",
            label_smoothing=0.0 if per_example else self.label_smoothing_factor,
        )
        if per_example:
            return losses.new_zeros(labels.shape).masked_scatter(is_target, losses).sum(1)
        return {"loss": losses.sum()}

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, int]:
        return {"loss": int((batch["labels"] != IGNORE_INDEX).sum())}


def check_decoder(training: Training, model: torch.nn.Module) -> None:
    """Raises InputError when a decoder sees what it is to predict, as encoders do."""
    tokens = torch.arange(32).view(2, 16) % model.config.get_text_config().vocab_size
    tokens[1, :8] = tokens[0, :8]
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels[:, 4] = tokens[:, 4]
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    with amplified(model):
        one, other = training.forward(batch, per_example=True).tolist()
    if abs(one - other) > LEAK * abs(one):
        raise InputError(
            f"model: the tokens of {model.config.model_type} see those that they are to predict: "
            "set model.is_decoder: true, or take another"
        )


def example_losses(
    training: Training, encode: PairEncoder, examples: list[Example]
) -> list[float] | None:
    """Of each the sum over its target's tokens; None when a signal interrupts."""

    def score(indices: list[int]) -> list[float]:
        batch = encode.collate([examples[index] for index in indices])
        return training.forward(batch, per_example=True).tolist()

    losses = score_examples(training, examples, score, "evaluating")
    if losses is not None:
        check_finite(losses)
    return losses


def target_length(example: Example) -> int:
    return len(example["input_ids"]) - example["source_length"]


@at_end
def main() -> None:
    args = parse(Arguments)
    tokenizer = load_tokenizer(args)
    check_tokenizer(tokenizer, args)
    config = model_config(args, tokenizer)
    args = replace(args, source_prefix=own_prefix(config, args, args.task))
    is_encoder_decoder = config.is_encoder_decoder
    auto_model = (
        transformers.AutoModelForSeq2SeqLM
        if is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    if getattr(config.get_text_config(decoder=True), "output_router_logits", False):
        raise InputError(
            f"model: {config.model_type} adds a loss of its router, which this recipe does not "
            "train on: set output_router_logits to false in its config"
        )
    if is_encoder_decoder:
        tokenizer.model_max_length = args.max_source_length  # where the export is read
        settle_tokens(config, tokenizer, args)
    empty = empty_model(config, auto_model)
    args.check_model_fits(empty, args.new_tokens)
    tables = (args.train_data, args.validation_data, args.test_data)
    pairs, leaks = hold_out([read_pairs(part, args) for part in tables], attrgetter("source"), args)
    train_pairs, validation_pairs, test_pairs = pairs
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    texts = digest((pair.source, pair.target) for pair in train_pairs)
    fingerprint = {"the training data": texts, "the tokenizer": digest([backend])}
    encode = PairEncoder(tokenizer, args, config)
    encode_pairs = naming_failures(encode)
    train = encode_pairs(train_pairs)
    mixture = Mixture(train, args)
    facts: dict[str, Any] = {
        "pairs": f"{len(train):,}; cut are {encode.cut_sources:,} sources and "
        f"{encode.cut_targets:,} targets",
        **leaks,
        **mixture.facts,
    }
    validation, test = encode_pairs(validation_pairs), encode_pairs(test_pairs)
    args = args.for_examples(mixture.count)
    check_ids([*train, *validation, *test], empty, is_encoder_decoder)
    generation = generation_config(empty, encode, args)
    folder = RunFolder(args.output_dir, args.resume)
    if folder.is_finished(args, fingerprint["the training data"]):
        return

    training = Training(args, folder)
    task = "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM"
    model, trained = task_model(args, config, auto_model, task, folder.path)
    model.generation_config = generation
    objective = TargetLoss(model, args.label_smoothing_factor)
    options = generation.to_diff_dict().items()
    shown = ", ".join(f"{name} {value}" for name, value in options if "version" not in name)
    shown = shorten(shown, 400)
    facts = {"trained": trainable_share(trained), **facts, "texts are generated with": shown}
    training.prepare(
        objective,
        trained,
        tokenizer,
        Epochs(mixture, lambda rows: encode.collate([*chain(*rows)]), fingerprint, args),
    )
    if not is_encoder_decoder:
        check_decoder(training, model)

    def evaluate(
        pairs: list[Pair], examples: list[Example], count: int | None
    ) -> tuple[dict[str, Any], list[str], list[float]] | None:
        """Mean loss of a target token and scores of the first `count` texts, in all and by table;
        these texts; the loss of each example. None when a signal interrupts."""
        losses = example_losses(training, encode, examples)
        if losses is None:
            return None
        asked, texts = examples[:count], []
        if asked:
            texts = generate(training, model, encode, asked, args.per_device_eval_batch_size)
        if texts is None:
            return None

        def measure(indices: list[int]) -> dict[str, float]:
            tokens = sum(target_length(examples[i]) for i in indices)
            results = {"eval_loss": math.fsum(losses[i] for i in indices) / tokens}
            written = [(texts[i], pairs[i].target) for i in indices if i < len(texts)]
            scores = text_scores(*zip(*written, strict=True), args.metrics) if written else {}
            return results | {f"eval_{name}": value for name, value in scores.items()}

        return by_domain([pair.table for pair in pairs], measure), texts, losses

    for _ in training.steps():
        if training.evaluates() and validation:
            found = evaluate(validation_pairs, validation, args.eval_generate_examples)
            training.record_evaluation(found and found[0])
    if training.stopped:
        return

    if test:
        training.load_best()
        found = evaluate(test_pairs, test, None)
        if found is None:
            return training.stop()
        results, texts, losses = found
        training.record_test(results)
        for name, value in results.items():
            if not isinstance(value, dict):
                facts[f"{name.removeprefix('eval_')} of the test texts"] = f"{value:.4f}"
        if args.lead_sentences:
            leads = [first_sentences(pair.source, args.lead_sentences) for pair in test_pairs]
            targets = [pair.target for pair in test_pairs]
            for name, value in text_scores(leads, targets, args.metrics).items():
                facts[f"{name} of the first {args.lead_sentences} sentences"] = f"{value:.4f}"
        facts |= {
            f"how {name} is computed": text for name, text in signatures(args.metrics).items()
        }
        with training.ranks.together():
            if training.is_main:
                records = (
                    {
                        "row": pair.place,
                        "source": pair.source,
                        "reference": pair.target,
                        "prediction": text,
                        "loss": loss / target_length(example),
                        "tokens": target_length(example),
                    }
                    for pair, example, text, loss in zip(
                        test_pairs, test, texts, losses, strict=True
                    )
                )
                write_predictions(folder.path / "predictions.jsonl", records)
    conclude(training, "Text to text", args.task, usage(auto_model, encode), facts)


if __name__ == "__main__":
    command(main)
