"""From a causal model to its losses: its own forward up to the output layer, then chunk by chunk.

The model's forward is called as transformers wrote it, whatever stands between its layers and the
output layer; of the output layer it sees one position. What it does to the logits afterwards and
adds to its loss is settled by numbers at the first forward, before anything is trained.
"""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from textwrap import shorten
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy, pad

from chunked_loss import summed_cross_entropy, token_scores
from utils.config import InputError
from utils.divergences import Logits, changed_logits
from utils.loss import IGNORE_INDEX, LEAK, LossArguments, amplified, changes, check_packing
from utils.model import optional_inputs

# settings by which models of transformers scale and cap their logits
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# by what names configs call the weight of the loss that balances a router
ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
LOGIT_STD = 4  # of the logits that are looked at: a cap of 30 changes them by up to 2%


def output_layer(model: "transformers.PreTrainedModel") -> torch.nn.Linear:
    """The projection to the logits; where an adapter brings its own (modules_to_save), that one.

    Raises:
        InputError: there is none, or it is more than linear.
    """
    layer, kind = model.get_output_embeddings(), model.config.model_type
    if saved := getattr(layer, "modules_to_save", None):
        layer = saved["default"]
    if hasattr(layer, "base_layer") or hasattr(layer, "token_adapter"):
        raise InputError(
            f"lora: the output layer of {kind} has an adapter inside, which the chunked loss "
            "cannot follow: take it out of target_modules, or train it whole by modules_to_save"
        )
    if not isinstance(layer, torch.nn.Linear):
        what = "no output layer" if layer is None else f"a {type(layer).__name__} as output layer"
        raise InputError(f"model: {kind} has {what}: the chunked loss needs a linear one")
    return layer


def router_weight(model: "transformers.PreTrainedModel") -> float:
    """Of the loss that balances a mixture's router in the model's own loss; 0: there is none."""
    config = model.config.get_text_config()
    if not any(getattr(c, "output_router_logits", False) for c in (config, model.config)):
        return 0.0
    places = (config, getattr(config, "ffn_config", None))
    found = (getattr(place, name, None) for place in places for name in ROUTER_WEIGHTS)
    return next((float(weight) for weight in found if weight is not None), 0.0)


class CausalHead:
    """The losses of a causal model, which never hold its logits.

    `names` has the cross-entropy alone, or where the config asks for it (output_router_logits) the
    loss that balances the router of a mixture of experts too. That one is the model's own, over
    the tokens of a micro-batch that are no padding, times its weight in the model's own loss. It
    is not linear in the tokens: a step takes the mean of its micro-batches', weighted by tokens.

    Raises:
        InputError: there is no linear output layer, or the model's own logits or loss are others.
    """

    def __init__(
        self,
        model: "transformers.PreTrainedModel",
        keeps_layers: bool = False,
        added: LossArguments | None = None,
    ):
        output_layer(model)
        self.added = added or LossArguments()
        self.model, self.router_weight = model, router_weight(model)
        self.keeps_layers, self.layers = keeps_layers, ()
        self.names = ("cross_entropy", "router_aux_loss") if self.router_weight else ("loss",)
        self.change: tuple[float, float | None] | None = None  # (scale, cap) of the logits

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What enters the output layer, (rows, tokens, width), and the sum of any further loss.

        Of all layers, if `keeps_layers`, they are in `layers` until the next call.

        Args:
            input_ids: (rows, tokens).
            position_ids: of the same shape; they restart with each document of a packed row. null:
                a row is one document.
            lengths: (rows,), tokens of each row before the padding; null: there is none.
        """
        if self.change is None:
            self.change = self._settle(input_ids)
        inputs = {"input_ids": input_ids}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        found, layer = [], output_layer(self.model)

        def keep(_: torch.nn.Module, entering: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            found.append(entering[0])
            return (entering[0][:, :1],)

        def leave_out_padding(_: torch.nn.Module, __: Any, output: Any) -> None:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            kept = (places < lengths[:, None]).flatten()
            logits = (x.reshape(kept.numel(), -1)[kept] for x in output.router_logits)
            output.router_logits = tuple(logits)

        tokens = input_ids.numel()
        if self.router_weight and lengths is not None:
            tokens = int(lengths.sum())
        if self.keeps_layers:
            inputs["output_hidden_states"] = True
        with ExitStack() as hooks:
            hooks.callback(layer.register_forward_pre_hook(keep).remove)
            if 0 < tokens < input_ids.numel():
                hook = self.model.base_model.register_forward_hook(leave_out_padding)
                hooks.callback(hook.remove)
            output = self._forward(**inputs)
        self.layers = output.get("hidden_states", ())
        if len(found) != 1 or found[0].shape[:-1] != input_ids.shape:
            raise InputError(
                f"model: {self.model.config.model_type} has more than one prediction of each token"
            )
        if not self.router_weight:
            return found[0], {}
        loss = torch.as_tensor(self._router_loss(output) * tokens, device=input_ids.device)
        return found[0], {"router_aux_loss": loss}

    def logits(self, hidden: torch.Tensor) -> Logits:
        """Of hidden states (rows, width); they are not held."""
        layer = output_layer(self.model)
        return Logits(hidden, layer.weight, layer.bias, *self.change)

    def cross_entropy(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum over the targets, in training with what is `added`."""
        layer, added = output_layer(self.model), self.added
        more = (added.label_smoothing_factor, added.z_loss) if self.model.training else ()
        return summed_cross_entropy(hidden, layer.weight, labels, layer.bias, *self.change, *more)

    def token_scores(
        self, hidden: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, whether the label is the most likely token) of each position."""
        layer = output_layer(self.model)
        return token_scores(hidden, layer.weight, labels, layer.bias, *self.change)

    def counts(self, labels: torch.Tensor, lengths: torch.Tensor) -> dict[str, int]:
        """What the sums are divided by: targets, and tokens."""
        counts = (int((labels != IGNORE_INDEX).sum()), int(lengths.sum()))
        return dict(zip(self.names, counts, strict=False))

    def _forward(self, **inputs: Any) -> Any:
        router = {"output_router_logits": True} if self.router_weight else {}
        return self.model(**inputs, use_cache=False, **router)

    def _router_loss(self, output: Any) -> torch.Tensor | float:
        loss = output.get("aux_loss")
        return 0.0 if loss is None else self.router_weight * loss

    def _settle(self, input_ids: torch.Tensor) -> tuple[float, float | None]:
        """How the logits are scaled and capped, from what becomes of given ones."""
        model, tokens = self.model, input_ids[:1, :8]
        kind, config = model.config.model_type, model.config.get_text_config()
        layer, was_training = output_layer(model), model.training
        draw = torch.Generator().manual_seed(0)
        given = torch.randn(1, tokens.shape[1], layer.out_features, generator=draw) * LOGIT_STD
        given = given.to(tokens.device)
        hook = layer.register_forward_hook(lambda *_: given)
        model.eval()
        try:
            with torch.no_grad():
                output = self._forward(input_ids=tokens, labels=tokens)
                logits, loss = output.logits.float(), output.loss
        except (torch.OutOfMemoryError, torch.distributed.DistBackendError):
            raise
        except Exception as error:  # models fail in ways of their own
            problem = f"{type(error).__name__}: {shorten(str(error), 100)}"
            raise InputError(f"model: {kind} cannot compute its own loss ({problem})") from None
        finally:
            hook.remove()
            model.train(was_training)
        values = [[getattr(config, name, None) for name in names] for names in (SCALES, CAPS)]
        scales, caps = ([float(v) for v in found if v] for found in values)
        for change in product([1.0, *scales, *(1 / scale for scale in scales)], [None, *caps]):
            ours = changed_logits(given.clone(), *change)
            if (
                ours.shape == logits.shape
                and (ours - logits).abs().max() < 1e-5 * logits.abs().max()
            ):
                break
        else:
            raise InputError(f"model: {kind} changes its logits in a way that is not known here")
        # some shift their labels, some leave that to the caller
        pairs = ((logits[0, :-1], tokens[0, 1:]), (logits[0], tokens[0]))
        plain = torch.stack([cross_entropy(*pair) for pair in pairs])
        left_out = (loss - self._router_loss(output) - plain).abs().min()
        if left_out > 1e-5 * plain.max():
            raise InputError(
                f"model: {kind} adds {left_out:.3g} to its own loss, which would be left out"
                + _terms(config)
            )
        return change


def _terms(config: Any) -> str:
    """Which settings might be the cause."""
    words = ("loss_coef", "loss_weight", "loss_alpha")
    names = [k for k, v in config.to_dict().items() if v and any(word in k for word in words)]
    return f": set {' and '.join(names)} to 0 in its config" if names else ""


def check_model(
    model: "transformers.PreTrainedModel",
    token_losses: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    length: int,
    packing: bool,
) -> None:
    """Raises InputError unless each token sees those before it in its document, and no others.

    Args:
        token_losses: a batch without `lengths` → the loss of each position.
        length: of the rows.
        packing: whether a row holds several documents.
    """
    config = model.config
    kind, vocabulary = config.model_type, config.get_text_config().vocab_size
    is_encoder = getattr(config, "is_decoder", None) is False
    takes_positions = "position_ids" in optional_inputs(model)
    if packing and (not takes_positions or getattr(model, "_is_stateful", False)):
        raise InputError(
            f"model: {kind} cannot keep packed documents apart: it is recurrent, or takes no "
            "position_ids: set packing: false"
        )

    def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = pad(batch["input_ids"][:, 1:], (0, 1), value=IGNORE_INDEX)
        return token_losses({**batch, "shift_labels": labels})

    places, later = torch.arange(length)[None], slice(length // 2, None)
    with amplified(model):
        try:
            first, second = changes(losses, places, later, vocabulary)
            # the last token of the first half has a changed one to predict
            if length > 3 and first[:, :-1].max() > LEAK * second.max():
                raise InputError(
                    f"model: the tokens of {kind} see those that they are to predict"
                    + (": set model.is_decoder: true" if is_encoder else "")
                )
            if packing:
                check_packing(losses, length, vocabulary)
        except (InputError, torch.OutOfMemoryError, torch.distributed.DistBackendError):
            raise
        except Exception as error:  # models fail in ways of their own
            problem = f"{type(error).__name__}: {shorten(str(error), 200)}"
            raise InputError(
                f"model: {kind} fails on a row of {length} tokens ({problem})"
            ) from None
