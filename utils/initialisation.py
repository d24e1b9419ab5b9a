"""Weights from scratch: as transformers draws them or by a rule, a function of the seed alone."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import transformers
from transformers.initialization import guard_torch_init_functions

from utils.config import InputError, Settings
from utils.fragments import gathered
from utils.randomness import random_key

# projections that write into the residual stream, and the blocks that mix tokens; others are MLPs
RESIDUAL = re.compile(
    r"(^|\.)(o_proj|out_proj|c_proj|down_proj|fc2|fc_out|dense_4h_to_h|Wo|w2|out_lin|lin2"
    r"|output\.dense|(self_attn|self_attention|attention)\.dense)(\.weight)?$"
)
MIXING = re.compile("att|mamba|conv")
# settings by which models multiply their embeddings by the root of the width; CTRL always does
SCALED_EMBEDDINGS = ("scale_embedding", "rescale_embeddings")


@dataclass
class InitializationArguments(Settings):
    """How weights from scratch are drawn, and what of that goes with the width."""

    # default: as transformers does; depth_scaled: what writes into the residual stream smaller by
    # the square root of 2 x layers; xavier: matrices but embeddings uniform, by both their sizes
    initialization: Literal["default", "depth_scaled", "xavier"] = "default"
    # muP: the learning rate that was found at this hidden_size holds at that of the model
    mup_base_width: int | None = None

    def check(self) -> None:
        is_given = getattr(self, "model_name_or_path", None) or getattr(self, "is_carved", False)
        for name in ("initialization", "mup_base_width"):
            if is_given and getattr(self, name) not in ("default", None):
                raise InputError(f"{name}: is of models from scratch: the weights are given here")
        if self.mup_base_width is not None:
            if self.mup_base_width < 1:
                raise InputError(f"mup_base_width must be at least 1, not {self.mup_base_width}")
            if self.initialization == "xavier":
                raise InputError(
                    "mup_base_width: xavier goes with the width in its own way: set "
                    "initialization: default or depth_scaled"
                )
            if getattr(self, "l1_decay", 0.0):
                raise InputError("mup_base_width: how L1 goes with the width is open: l1_decay: 0")
            if getattr(self, "has_adapter", False):
                raise InputError("mup_base_width: an adapter has no width: leave it out, or lora")
            if "adamw" not in getattr(self, "optim", "adamw"):
                raise InputError(
                    f"mup_base_width: its learning rates are Adam's, not those of {self.optim}: "
                    "set optim: adamw_torch_fused"
                )
        super().check()

    def fixed(self) -> dict[str, Any]:
        own = {"initialization": self.initialization, "mup_base_width": self.mup_base_width}
        return super().fixed() | {k: v for k, v in own.items() if v not in ("default", None)}


def initialize_weights(
    model: "transformers.PreTrainedModel",
    seed: int,
    only: set[str] | None = None,
    settings: InitializationArguments | None = None,
) -> None:
    """Initialise each module from (seed, its name): the same weights under every ZeRO stage.

    As transformers does: from the inside out, each module by the model that it is a part of, and
    what is tied as the parameter that the others follow.

    Args:
        only: the names of parameters and buffers; all others keep what they hold.
        settings: for a whole model (no `only`), what is drawn by another rule.

    Raises:
        InputError: a rule that does not fit this architecture.
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
    if only is None and settings is not None:
        _redraw(model, seed, settings)


@torch.no_grad()
def _redraw(model: "transformers.PreTrainedModel", seed: int, how: InitializationArguments) -> None:
    """Draw matrices anew, or scale them, as the settings say."""
    config, by_name = model.config.get_text_config(), dict(model.named_parameters())
    scales: dict[str, MupScale] = {}
    if how.mup_base_width is not None:
        scales = mup_scales(model, how.mup_base_width)
    deviation = getattr(config, "initializer_range", None)
    depth = (2 * (getattr(config, "num_hidden_layers", None) or 0.5)) ** 0.5
    redrawn: set[str] = set()
    if how.initialization == "depth_scaled":
        redrawn = _residual_projections(model)
    elif how.initialization == "xavier":
        redrawn = _matrices(model, "initialization: xavier").keys()
    if deviation is None and (scales or how.initialization == "depth_scaled"):
        kind = model.config.model_type
        name = "mup_base_width" if scales else "initialization"
        raise InputError(f"{name}: {kind} has no initializer_range that could be scaled")
    for name in sorted(redrawn | scales.keys()):
        parameter = by_name[name]
        with gathered([parameter], modify=True):
            torch.manual_seed(random_key(seed, name))
            if name in redrawn and how.initialization == "xavier":
                torch.nn.init.xavier_uniform_(parameter)
            elif name in redrawn:
                parameter.normal_(std=deviation / depth)
            if name in scales:
                _check_drawn(name, parameter, deviation, depth)
                parameter.mul_(scales[name].deviation)


def _residual_projections(model: "transformers.PreTrainedModel") -> set[str]:
    """The weights that write into the residual stream; raises InputError where not all are found:
    one of each layer's attention, or what stands for it, and one of its MLP."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 1
    found = {name for name, p in model.named_parameters() if RESIDUAL.search(name)}
    mixing = {name for name in found if MIXING.search(name)}
    if min(len(mixing), len(found - mixing)) < layers:
        raise InputError(
            f"initialization: the projections of {model.config.model_type} into the residual "
            f"stream are not known by name: {len(mixing)} of attention and "
            f"{len(found - mixing)} of MLPs were found for {layers} layers: take default"
        )
    return found


def _matrices(model: "transformers.PreTrainedModel", setting: str) -> dict[str, int]:
    """Weights of linear layers, and their outputs; raises InputError where there are other arrays,
    but for embeddings: experts that are held together, routers, convolutions."""
    found, embeddings = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[f"{name}.weight"] = module.out_features
        elif isinstance(module, transformers.pytorch_utils.Conv1D):
            found[f"{name}.weight"] = module.nf
        elif isinstance(module, torch.nn.Embedding):
            embeddings.add(f"{name}.weight")
    parameters = dict(model.named_parameters())  # what is tied once, by its first name
    arrays = {n for n, p in parameters.items() if len(getattr(p, "ds_shape", p.shape)) >= 2}
    if others := sorted(arrays - found.keys() - embeddings):
        kind = model.config.model_type
        raise InputError(
            f"{setting}: {others[0]} of {kind} is neither a linear layer nor an embedding"
        )
    return {name: outputs for name, outputs in found.items() if name in arrays}


class MupScale(NamedTuple):
    """What goes with the width, of a weight."""

    deviation: float  # of what is drawn
    learning_rate: float


def mup_scales(model: "transformers.PreTrainedModel", base_width: int) -> dict[str, MupScale]:
    """muP for Adam, after Yang et al. 2022 (Tensor Programs V), tables 3 and 8.

    With r = base_width / hidden_size the deviation of a hidden matrix is multiplied by √r and its
    learning rate by r, those of an output matrix both by r; embeddings, biases and norms stay.
    Table 8 multiplies the logits by r instead: to Adam that is the same (lemma J.1), and the model
    stays that of transformers. All widths go with hidden_size: intermediate_size and the number of
    heads. That of a head does not, and so its scores need no other scale than 1/√d.

    Raises:
        InputError: tied embeddings, or an architecture in which not all widths are known.
    """
    config, kind = model.config.get_text_config(), model.config.model_type
    width, embedding = getattr(config, "hidden_size", None), None
    with suppress(NotImplementedError):  # CANINE, which has several
        embedding = model.get_input_embeddings()
    if model.all_tied_weights_keys:
        raise InputError(
            f"mup_base_width: {kind} ties its output layer to its embeddings, of which the one has "
            "to learn more slowly in a wider model and the other has not: set "
            "model.tie_word_embeddings: false"
        )
    is_scaled = kind == "ctrl" or any(getattr(config, n, False) for n in SCALED_EMBEDDINGS)
    is_scaled |= any(getattr(module, "embed_scale", 1.0) != 1.0 for module in model.modules())
    if getattr(embedding, "embedding_dim", None) != width or is_scaled:
        raise InputError(
            f"mup_base_width: the embeddings of {kind} are of another width than hidden_size, or "
            "scaled by it: leave it out"
        )
    matrices = _matrices(model, "mup_base_width")
    inside = {f"{model.base_model_prefix}.{n}" for n, _ in model.base_model.named_parameters()}
    output = getattr(model.get_output_embeddings(), "weight", None)
    outside = matrices.keys() - inside  # a head may have hidden layers of its own
    heads = {n for n in outside if model.get_parameter(n) is output or matrices[n] != width}
    if not heads:
        raise InputError(f"mup_base_width: no output layer of {kind} was found: leave it out")
    ratio = base_width / width
    return {n: MupScale(ratio if n in heads else ratio**0.5, ratio) for n in matrices}


def _check_drawn(name: str, drawn: torch.Tensor, deviation: float, depth: float) -> None:
    """Raises InputError where transformers draws by another width than initializer_range's."""
    found, tolerance = float(drawn.std()), 0.1 + 5 / (2 * drawn.numel()) ** 0.5
    if all(abs(found / usual - 1) > tolerance for usual in (deviation, deviation / depth)):
        raise InputError(
            f"mup_base_width: {name} is drawn with a deviation of {found:.2g}, not "
            f"initializer_range ({deviation:.2g}): the architecture goes with the width by itself"
        )


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
