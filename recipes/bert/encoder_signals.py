"""What a student can learn of a teacher beside its probabilities: states, attention, relations.

Queries, keys and values are taken where transformers hands them to the attention, whatever that is
(sdpa, eager): after rotary positions and out of fused projections, so that query · key x scaling is
the score before the softmax. Models whose attention is their own (DeBERTa) do not hand them over.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from torch.nn.functional import normalize

from masked_loss import MaskedLoss
from utils.config import InputError
from utils.divergences import Divergence, Logits, summed_losses
from utils.teacher import whole

LEAST_SCORE = -100  # TinyBERT takes what is not above it for 0


class Attention(NamedTuple):
    """What enters the attention of a layer."""

    query: torch.Tensor  # (rows, heads, tokens, width of a head)
    key: torch.Tensor  # and these; several heads may share one of their heads
    value: torch.Tensor
    scaling: float | None  # of query · key; None: 1 / √width

    def scores(self) -> torch.Tensor:
        """(rows, heads, tokens, tokens), before masks and softmax."""
        scaling = self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        return self.query.float() @ key.float().transpose(2, 3) * scaling


class Signals(NamedTuple):
    """What a model computes of rows on the way to its logits."""

    entering: torch.Tensor  # (targets, width): the output layer
    last_hidden_state: torch.Tensor  # (rows, tokens, width)
    hidden_states: Sequence[torch.Tensor] | None  # of the embeddings and of each layer, like it
    attention: dict[int, Attention]  # of the layers that were asked for, from 1
    pairs: torch.Tensor | None  # (pairs, 2): logits, if the model has a head for them


class ObservedEncoder(MaskedLoss):
    """A masked language model, and what it computes on the way to its logits.

    Args:
        hidden_states: whether those of all layers are wanted.
        attention: layers, from 1, whose queries, keys and values are.
    """

    def __init__(
        self,
        model: "transformers.PreTrainedModel",
        objective: str,
        packing: bool,
        hidden_states: bool = False,
        attention: Collection[int] = (),
    ):
        super().__init__(model, objective, packing)
        self.flags = {"output_hidden_states": True} if hidden_states else {}
        self.attention = attention
        self.of_base: list | None = None  # what the base model gives, while that is wanted
        self.is_settled = False  # whether the logits are known to be what the output layer says

    def forward(self, per_target: bool = False, **batch: torch.Tensor) -> Any:
        """As that of `MaskedLoss`, or unless `per_target` the signals of all that is no padding."""
        if per_target:
            return super().forward(per_target=True, **batch)
        return self.signals(batch, (batch["sequence_ids"] > 0).flatten().nonzero().squeeze(1))

    def signals(self, batch: dict[str, torch.Tensor], targets: torch.Tensor) -> Signals:
        """
        Args:
            targets: positions of the flattened rows, which the heads are to see.

        Raises:
            InputError: the model keeps some of it to itself, or changes its logits.
        """
        layer, entering, found = self.model.get_output_embeddings(), [], {}
        kind = self.config.model_type
        if not isinstance(layer, torch.nn.Linear):
            raise InputError(f"model: {kind} has no linear output layer")

        def keep(_: torch.nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            entering.append(given[0])
            return (given[0][:, :1],)  # the logits of one position are the model's way to its end

        self.of_base = []
        with ExitStack() as observed:
            observed.callback(layer.register_forward_pre_hook(keep).remove)
            if self.attention:
                observed.enter_context(observed_attention(found, self.attention))
            logits, pairs = self.output(batch, targets, **self.flags)
        (last, states), self.of_base = self.of_base, None
        if {*self.attention} - found.keys():
            raise InputError(
                f"model: {kind} has an attention of its own, which attention_weight and "
                "relation_weight cannot look into"
            )
        if self.flags and {x.shape[:2] for x in states or [targets[None]]} != {last.shape[:2]}:
            raise InputError(
                f"model: {kind} gives no hidden states of each token: hidden_weight: 0"
            )
        if len(entering) != 1:
            raise InputError(f"model: {kind} has other logits than those of its output layer")
        entering = entering[0].flatten(0, -2)
        if not self.is_settled and len(entering):
            ours = self.logits(entering)
            with whole(ours.weight, ours.bias):
                ours, logits = ours.rows(slice(1)), logits.flatten(0, -2).float()
            # in bfloat16 they are rounded otherwise
            if (ours - logits).abs().max() > 0.02 * logits.abs().max():
                raise InputError(f"model: {kind} changes its logits after the output layer")
            self.is_settled = True
        return Signals(entering, last, states, found, pairs)

    def logits(self, entering: torch.Tensor) -> Logits:
        layer = self.model.get_output_embeddings()
        return Logits(entering, layer.weight, layer.bias)

    def _keep_targets(self, base_model: torch.nn.Module, given: Any, output: Any) -> Any:
        if self.of_base is not None:
            self.of_base += [output.last_hidden_state, output.get("hidden_states")]
        return super()._keep_targets(base_model, given, output)


@contextmanager
def observed_attention(found: dict[int, Attention], layers: Collection[int]) -> Iterator[None]:
    """In this context the attention of models of transformers leaves what enters it in `found`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions  # takes a second

    get, called = functions.get_interface, 0

    def get_observed(*names: Any) -> Callable:
        function = get(*names)

        def observed(module: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any):
            nonlocal called
            called += 1
            if called in layers:
                found[called] = Attention(query, key, value, options.get("scaling"))
            return function(module, query, key, value, *rest, **options)

        return observed

    functions.get_interface = get_observed
    try:
        yield
    finally:
        del functions.get_interface


def cosine_loss(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Σ over the rows of 1 - cos: as half of a square it is 0, and not almost, of what is equal."""
    difference = normalize(mine.float(), dim=1) - normalize(theirs.float(), dim=1)
    return difference.square().sum() / 2


def attention_loss(
    student: dict[int, Attention],
    teacher: dict[int, Attention],
    layers: Sequence[int],
    sequence_ids: torch.Tensor,
) -> torch.Tensor:
    """Σ over the tokens of the mean squared difference of their scores before the softmax.

    The mean is over the tokens of the same sequence, heads and layers (Jiao et al. 2020, TinyBERT,
    which adds the layers up).

    Args:
        layers: for each layer of the student that of the teacher, from 1.
        sequence_ids: (rows, tokens), 0 for padding.
    """
    same = same_sequence(sequence_ids)
    weights = same / same.sum(2, keepdim=True).clamp(min=1)
    losses = []
    for mine, theirs in enumerate(layers, 1):
        with torch.autocast(sequence_ids.device.type, enabled=False):
            scores = [found.scores() for found in (student[mine], teacher[theirs])]
        first, second = (x.where(x > LEAST_SCORE, 0) for x in scores)
        losses.append(((first - second).square().mean(1) * weights).sum())
    return torch.stack(losses).mean()


def relation_loss(
    student: Attention, teacher: Attention, heads: int, sequence_ids: torch.Tensor
) -> torch.Tensor:
    """Σ over the tokens of KL(teacher ‖ student) of the relations among queries, keys and values.

    All heads are put together and cut again into as many relation heads for both: a relation is the
    softmax of x · x / √width over the tokens of the same sequence, x queries, keys or values. The
    three are added up, the mean is over the heads (Wang et al. 2021, MiniLMv2).
    """
    kept = sequence_ids > 0
    apart = ~same_sequence(sequence_ids)[kept][:, None]  # (tokens kept, 1, tokens)
    total = torch.zeros((), device=sequence_ids.device)
    for pair in zip(student[:3], teacher[:3], strict=True):
        mine, theirs = (
            Logits(relations(x, heads)[kept].masked_fill(apart, -math.inf).flatten(0, 1))
            for x in pair
        )
        total = total + summed_losses(mine, None, theirs, Divergence())[1]
    return total / heads


def relations(vectors: torch.Tensor, heads: int) -> torch.Tensor:
    """(rows, heads, tokens, width) → (rows, tokens, relation heads, tokens)."""
    rows, groups, tokens, width = vectors.shape
    if groups * width % heads:
        raise InputError(
            f"relation_heads: {heads} do not divide a width of {groups * width} of the attention"
        )
    with torch.autocast(vectors.device.type, enabled=False):
        cut = vectors.float().transpose(1, 2).reshape(rows, tokens, heads, -1)
        return torch.einsum("rqhw,rkhw->rqhk", cut, cut) * cut.shape[-1] ** -0.5


def same_sequence(sequence_ids: torch.Tensor) -> torch.Tensor:
    """(rows, tokens, tokens): whether two tokens are of one sequence, and no padding."""
    return (sequence_ids[:, :, None] == sequence_ids[:, None]) & (sequence_ids > 0)[:, None]
