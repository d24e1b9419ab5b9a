"""Whether an encoder can be trained as the recipe does it: settled by numbers, before any step."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

import torch

from utils.config import InputError
from utils.loss import IGNORE_INDEX, amplified, check_packing

# a batch → term → (the loss of each target, whether the most likely class is right)
Scores = Callable[[dict[str, torch.Tensor]], dict[str, tuple[torch.Tensor, torch.Tensor]]]


def check_objective(objective: torch.nn.Module, scores: Scores, lengths: Iterable[int]) -> None:
    """Raises InputError unless heads see each target alone, and packed sequences not each other.

    Args:
        objective: a `MaskedLoss`.
        scores: what it gives `per_target`.
        lengths: of the rows.
    """
    kind, vocabulary = objective.config.model_type, objective.config.get_text_config().vocab_size

    def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(0)  # Reformer's buckets are drawn
        return scores(_unmasked(**batch))["mlm"][0].view(batch["input_ids"].shape)

    how = "packed" if objective.packing else "padded"
    advice = ": set packing: false" if objective.packing else ""
    # models fail in ways of their own on a mask they do not expect
    failure = f"model: {kind} cannot be trained on {how} rows"
    with trial(failure, advice), amplified(objective.model):
        for length in sorted(lengths):
            _check_targets(losses, scores, length, vocabulary, kind)
            if objective.packing:
                # what a mask hides weighs exactly 0, in every precision
                check_packing(losses, length, vocabulary)


def check_signals(forward: Callable[[dict[str, torch.Tensor]], Any], kind: str) -> None:
    """Raises InputError unless a model of that kind gives what is distilled."""
    tokens, places = torch.arange(8)[None], torch.arange(8)[None]
    with trial(f"model: {kind} does not give what is to be distilled"):
        forward(_unmasked(tokens, places))


@contextmanager
def trial(problem: str, advice: str = "") -> Iterator[None]:
    """In this context whatever a model fails with is an InputError, which begins so."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError, torch.distributed.DistBackendError):
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {shorten(str(error), 100)}"
        raise InputError(f"{problem} ({cause}){advice}") from None


def _check_targets(
    losses: Callable, scores: Scores, length: int, vocabulary: int, kind: str
) -> None:
    """The loss of a target is the same, whatever others there are."""
    tokens = 7 * torch.arange(length)[None] % vocabulary
    places = torch.arange(length)[None]
    batch = _unmasked(tokens, places)
    batch["labels"] = torch.where(places % 3 == 1, tokens, IGNORE_INDEX)
    some, expected = scores(batch)["mlm"][0], losses({"input_ids": tokens, "position_ids": places})
    expected = expected[places % 3 == 1]
    # in bfloat16 the logits of another number of rows are rounded otherwise
    if (some - expected).norm() > 0.1 * expected.norm():
        raise InputError(f"model: the head of {kind} sees more than the position it predicts")


def _unmasked(input_ids: torch.Tensor, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of sequences of which every token is a target, and none is masked."""
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "labels": input_ids,
        "token_type_ids": torch.zeros_like(input_ids),
        "sequence_ids": 1 + (position_ids == 0).cumsum(1),
        "pair_labels": torch.full_like(input_ids, IGNORE_INDEX),
    }
