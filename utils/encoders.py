"""What differs between the encoders of transformers: masks of packed rows, positions, heads."""

import inspect
import math
from typing import Any

import torch
from transformers import PreTrainedModel

from utils.config import InputError

PAIR_HEADS = {"seq_relationship", "sop_classifier"}


def block_diagonal_mask(sequence_ids: torch.Tensor, config: Any, dtype: torch.dtype) -> Any:
    """An attention mask by which the sequences of a row do not see each other.

    Additive, because eager attention takes booleans for numbers. Where the model has layers of
    sliding attention, a dict with a mask for each kind of layer, as ModernBERT takes it.

    Args:
        sequence_ids: (rows, sequence_length).

    Returns:
        (rows, 1, sequence_length, sequence_length): 0 or the smallest number of the dtype.
    """
    blocks = sequence_ids[:, None, :, None] == sequence_ids[:, None, None, :]
    smallest = torch.finfo(dtype).min
    mask = torch.where(blocks, 0.0, smallest).to(dtype)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return mask
    place = torch.arange(blocks.shape[-1], device=blocks.device)
    is_far = (place[:, None] - place[None, :]).abs() > config.sliding_window
    return {"full_attention": mask, "sliding_attention": mask.masked_fill(is_far, smallest)}


def optional_inputs(model: PreTrainedModel) -> list[str]:
    """Which of position_ids and token_type_ids the model takes."""
    takes = inspect.signature(model.base_model.forward).parameters
    # a model with one type only (RoBERTa) knows it
    has_types = getattr(model.config, "type_vocab_size", 0) > 1
    return [
        name
        for name, is_known in {"position_ids": True, "token_type_ids": has_types}.items()
        if is_known and name in takes
    ]


def first_position(model: PreTrainedModel) -> int:
    """The position id of a sequence's first token: RoBERTa's begin after that of the padding."""
    embeddings = getattr(model.base_model, "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return 0 if padding is None else padding + 1


def check_encoder(
    model: PreTrainedModel, sequence_length: int, with_pairs: bool, packing: bool
) -> None:
    """Raises InputError when the model lacks what the objective, the length or packing needs."""
    kind = model.config.model_type
    if packing and "position_ids" not in optional_inputs(model):
        raise InputError(
            f"model: {kind} takes no position_ids, which packed rows need: set packing: false"
        )
    heads = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if with_pairs and not heads & PAIR_HEADS:
        raise InputError(
            f"objective: {kind} has no head for pairs, as bert and albert have: set objective: mlm"
        )
    positions = getattr(model.config, "max_position_embeddings", math.inf)
    if first_position(model) + sequence_length > positions:
        raise InputError(
            f"sequence_length: {sequence_length} and the model's first position "
            f"{first_position(model)} are more than its max_position_embeddings of {positions}"
        )
