"""Tokens that a chat template needs and the given model lacks."""

import math
from typing import Any

import torch

from utils.config import InputError
from utils.fragments import gathered
from utils.model_settings import quiet


def check_added_tokens(added: list[str], tokenizer: Any, config: Any, arguments: Any) -> None:
    """Raises InputError where they would never be learnt, or their embeddings not be exported.

    Args:
        added: those that the tokenizer lacked; the model may lack others of `add_tokens`, too.
    """
    if len(tokenizer) > getattr(config.get_text_config(decoder=True), "vocab_size", math.inf):
        added = added or arguments.add_tokens
    setting = "lora" if arguments.has_adapter else "freeze"
    if added and (arguments.has_adapter or arguments.freeze is not None):
        raise InputError(
            f"add_tokens: {added[0]} needs an embedding that is trained and exported with the "
            f"model: leave out {setting}, or choose a chat_template that needs no new token (plain)"
        )


def embed_added_tokens(model: Any, tokenizer: Any, added: list[str]) -> None:
    """Begin each at the mean of all other tokens, as input and as output, grown if need be.

    So the probabilities of the others stay as they were, nearly (Hewitt 2021); beside logits that
    are all below 0, that of a new row of small numbers would be the largest.
    """
    held = model.get_input_embeddings().num_embeddings
    if not added and len(tokenizer) <= held:
        return
    first = min([held, *tokenizer.convert_tokens_to_ids(added)])
    if len(tokenizer) > held:
        with quiet():  # a multiple of 64 suits the hardware
            model.resize_token_embeddings(
                len(tokenizer), pad_to_multiple_of=64, mean_resizing=False
            )
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    tensors = [t for layer in layers for t in (layer.weight, getattr(layer, "bias", None))]
    tensors = [tensor for tensor in tensors if tensor is not None]
    with gathered(tensors, modify=True), torch.no_grad():
        for tensor in tensors:
            tensor[first:] = tensor[:first].mean(0, dtype=torch.float32).to(tensor.dtype)
