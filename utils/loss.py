"""What the losses of language models presume: a linear head, and documents kept apart."""

from collections.abc import Callable

import torch
import transformers

from utils.config import InputError

IGNORE_INDEX = -100  # a label that is no target
# The change of a loss that shows a leak, beside those that are to change. What is masked adds
# exactly 0; a new model leaks as little as 5e-4.
LEAK = 1e-5

# settings by which models of transformers change the logits further, and the value that does not
LOGIT_SETTINGS = {
    "final_logit_softcapping": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "lm_head_multiplier": 1,
}


def check_head(model: "transformers.PreTrainedModel") -> None:
    """Raises InputError unless the logits of the model are a linear map of its hidden states."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear) or {*model.children()} != {model.base_model, head}:
        raise InputError(
            f"model: {model.config.model_type} has more than a linear head between its hidden "
            "states and the logits: the chunked loss cannot follow"
        )
    for name, neutral in LOGIT_SETTINGS.items():
        value = getattr(model.config, name, None)
        if value not in (None, neutral):
            raise InputError(
                f"model.{name}: {value} changes the logits after the head, which the chunked loss "
                f"does not: set it to {'null' if neutral is None else neutral}"
            )


def check_packing(
    token_losses: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    shape: tuple[int, int],
    vocabulary: int,
) -> None:
    """Raises InputError when a document sees the one before it in the row.

    Not every model of transformers masks its attention by the position ids, though it takes them.

    Args:
        token_losses: input_ids and position_ids → the loss of each position, all of shape (rows,
            sequence_length).
    """
    rows, sequence_length = shape
    middle = sequence_length // 2
    tokens = 7 * torch.arange(rows * sequence_length).view(shape) % vocabulary
    others = tokens.clone()
    others[:, :middle] = (tokens[:, :middle] + vocabulary // 2) % vocabulary
    places = torch.arange(sequence_length)
    places = torch.where(places < middle, places, places - middle).expand(shape)
    before, after = (
        token_losses({"input_ids": x, "position_ids": places}) for x in (tokens, others)
    )
    first, second = (after - before).abs().split([middle, sequence_length - middle], dim=1)
    if middle and second.max() > LEAK * first.max():
        raise InputError(
            "model: documents in one row see each other: it cannot train on packed rows"
        )
