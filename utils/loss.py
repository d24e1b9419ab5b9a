"""What the losses of language models presume: documents that do not see each other."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from utils.config import InputError, Settings
from utils.fragments import gathered

IGNORE_INDEX = -100  # a label that is no target
# The change of a loss that shows a leak, beside those that are to change. What is masked adds
# exactly 0.
LEAK = 1e-5
PACKED = ("Int8Params", "Params4bit")  # what bitsandbytes calls weights in 8 and 4 bits


@dataclass
class LossArguments(Settings):
    """What is added to the cross-entropy in training; evaluations are without it."""

    label_smoothing_factor: float = 0.0  # of the probability, spread over the vocabulary
    z_loss: float = 0.0  # times log² of the logits' normalizer, as PaLM's 1e-4

    def check(self) -> None:
        if not 0 <= self.label_smoothing_factor < 1:
            raise InputError(
                f"label_smoothing_factor must be in [0, 1), not {self.label_smoothing_factor}"
            )
        if not 0 <= self.z_loss < math.inf:
            raise InputError(f"z_loss must not be negative, not {self.z_loss}")
        super().check()

    def fixed(self) -> dict[str, Any]:
        own = {"label_smoothing_factor": self.label_smoothing_factor, "z_loss": self.z_loss}
        return super().fixed() | {name: value for name, value in own.items() if value}


def check_packing(token_losses: Callable, length: int, vocabulary: int) -> None:
    """Raises InputError when a document sees the one before it in the row.

    Not every model of transformers masks its attention by the position ids, though it takes them,
    and flash attention does so in a row that is alone.

    Args:
        token_losses: input_ids and position_ids → the loss of each position, all of shape (rows,
            length).
    """
    places = torch.arange(length)
    places = torch.where(places < length // 2, places, places - length // 2)
    for rows in (1, 2) if length > 1 else ():
        halves = changes(token_losses, places.expand(rows, length), slice(length // 2), vocabulary)
        if halves[1].max() > LEAK * halves[0].max():
            raise InputError(
                "model: documents in one row see each other: it cannot train on packed rows: "
                "set packing: false"
            )


def changes(
    token_losses: Callable, places: torch.Tensor, changed: slice, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each half of the rows, how much the losses change with the tokens of `changed`."""
    tokens = 7 * torch.arange(places.numel()).view(places.shape) % vocabulary
    others = tokens.clone()
    others[:, changed] = (tokens[:, changed] + vocabulary // 2) % vocabulary
    before, after = (
        token_losses({"input_ids": x, "position_ids": places}) for x in (tokens, others)
    )
    middle = places.shape[1] // 2
    first, second = (after - before).abs().split([middle, places.shape[1] - middle], dim=1)
    return first, second


@contextmanager
def amplified(model: torch.nn.Module) -> Iterator[None]:
    """In this context weights are so large that whatever a token sees shows in its loss.

    A new model may hide it: behind a projection that begins at zero, or a small initializer_range.
    Each matrix is multiplied by a power of two, which is undone to the bit. Those in 8 and 4 bits
    are not rounded to them on the way: LLM.int8 rounds a row by what stands in the others.
    """
    factors = {}
    torch.manual_seed(0)
    quantized = [m for m in model.modules() if type(getattr(m, "weight", None)).__name__ in PACKED]
    for layer in quantized:
        layer.forward = partial(_unrounded, layer, _factor(_whole_weight(layer)))
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            with gathered([parameter], modify=True):
                factors[parameter] = _factor(parameter)
                if factors[parameter]:
                    parameter.data.mul_(factors[parameter])
                else:
                    parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    try:
        yield
    finally:
        for layer in quantized:
            del layer.forward
        for parameter, factor in factors.items():
            with gathered([parameter], modify=True):
                parameter.data.mul_(1 / factor if factor else 0.0)


def _factor(matrix: torch.Tensor) -> float:
    """The power of two that makes its outputs about as large as its inputs; 0 if it is all 0."""
    norm = torch.linalg.vector_norm(matrix.detach(), dtype=torch.float32)
    norm = float(getattr(norm, "full_tensor", lambda: norm)())
    gain = norm / max(1, matrix.numel()) ** 0.5 * matrix.shape[-1] ** 0.5
    return 2.0 ** max(0, math.floor(-math.log2(gain))) if gain else 0.0


def _whole_weight(layer: torch.nn.Module) -> torch.Tensor:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))


def _unrounded(layer: torch.nn.Module, factor: float, inputs: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
    return linear(inputs, (_whole_weight(layer) * factor).to(inputs.dtype), bias)
