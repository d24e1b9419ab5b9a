"""Weights from scratch: as transformers draws them, and a function of the seed alone."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers.initialization import guard_torch_init_functions

from utils.fragments import gathered
from utils.randomness import random_key


def initialize_weights(
    model: "transformers.PreTrainedModel", seed: int, only: set[str] | None = None
) -> None:
    """Initialise each module from (seed, its name): the same weights under every ZeRO stage.

    As transformers does: from the inside out, each module by the model that it is a part of, and
    what is tied as the parameter that the others follow.

    Args:
        only: the names of parameters and buffers; all others keep what they hold.
    """
    tied = model.all_tied_weights_keys  # {follows: leads}
    for name, module, initialize in _modules_by_model(model):
        tensors = list(_tensors_near(name, module))
        drawn = {id(t) for k, t in tensors if k not in tied and (only is None or k in only)}
        if not drawn:
            continue
        for _, tensor in tensors:
            tensor._is_hf_initialized = id(tensor) not in drawn
        parameters = [t for _, t in tensors if isinstance(t, torch.nn.Parameter)]
        with gathered(parameters, modify=True), guard_torch_init_functions():
            torch.manual_seed(random_key(seed, name))
            if isinstance(module, transformers.pytorch_utils.Conv1D):
                torch.nn.init.normal_(module.weight, std=0.02)  # OpenAI-GPT leaves it at that
            initialize(module)


def _modules_by_model(
    model: "transformers.PreTrainedModel",
) -> Iterator[tuple[str, torch.nn.Module, Callable[[torch.nn.Module], None]]]:
    """(name, module, `_init_weights` of the innermost model around it), children first."""
    seen = set()

    def walk(name: str, module: torch.nn.Module, initialize: Any) -> Iterator:
        if module in seen:
            return
        seen.add(module)
        for key, child in module.named_children():
            is_model = isinstance(child, transformers.PreTrainedModel)
            inside = child._init_weights if is_model else initialize
            yield from walk(f"{name}.{key}".lstrip("."), child, inside)
        yield name, module, initialize

    yield from walk("", model, model._init_weights)


def _tensors_near(name: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers that the initialisation of a module may reach: its own and those of
    its parts, but of no list of layers and no other model."""
    for tensors in (module._parameters, module._buffers):
        yield from ((f"{name}.{k}".lstrip("."), t) for k, t in tensors.items() if t is not None)
    for key, child in module.named_children():
        if not isinstance(child, torch.nn.ModuleList | transformers.PreTrainedModel):
            yield from _tensors_near(f"{name}.{key}".lstrip("."), child)
