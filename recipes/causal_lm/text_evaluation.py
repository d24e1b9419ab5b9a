"""What a model of text has learnt: bits per byte of held-out documents, and texts to read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bits_per_byte import evaluate_by_domain
from utils.config import InputError, Settings
from utils.model_settings import max_positions
from utils.scoring import generate_texts
from utils.sources import Source, held_out_documents
from utils.stream import TextEncoder
from utils.training import Training


@dataclass
class TextEvaluationArguments(Settings):
    """On what text a model is evaluated."""

    validation_sources: list[Source] = field(default_factory=list)  # each read once
    test_sources: list[Source] = field(default_factory=list)  # read once, at the end of the run
    eval_documents: int | None = None  # of each validation source; null: all
    sample_prompts: list[str] = field(default_factory=list)  # continued at each evaluation

    def check(self) -> None:
        super().check()
        if self.eval_documents is not None and self.eval_documents < 1:
            raise InputError(f"eval_documents must be at least 1, not {self.eval_documents}")
        if self.validation_sources:
            self.check_metric(["eval_loss", "eval_bits_per_byte"])


def evaluate_documents(
    training: Training,
    sources: list[Source],
    encode: TextEncoder,
    token_losses: Callable[..., torch.Tensor],
) -> dict[str, Any] | None:
    """Loss and bits per byte on held-out documents, by domain; None when a signal interrupts.

    Args:
        token_losses: a batch → the loss of each position.
    """
    a = training.arguments
    documents, size = held_out_documents(sources, a.eval_documents, a), a.per_device_batch_size
    return evaluate_by_domain(
        training.ranks,
        documents,
        encode,
        token_losses,
        a.sequence_length,
        size,
        a.packing,
        a.on_bad_record,
    )


def write_samples(
    training: Training, model: Any, tokenizer: Any, encode: TextEncoder, prompts: list[str]
) -> list[dict[str, str]] | None:
    """What the model writes after each prompt: 60 tokens, drawn at temperature 0.8.

    None when a signal interrupts.
    """
    positions, _ = max_positions(model.config)
    room = min(60, positions // 2)
    begun = [tokens[:-1][room - positions :] for tokens in encode(prompts)]
    options = {"do_sample": True, "temperature": 0.8}
    texts = generate_texts(training, model, tokenizer, begun, room, **options)
    if texts is None:
        return None
    pairs = zip(prompts, texts, strict=True)
    return [{"prompt": prompt, "text": text} for prompt, text in pairs]
