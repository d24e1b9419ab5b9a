"""Parameters, and what training holds in memory by part, known from the model's config alone.

Of activations the bytes are those of a forward and backward that torch's FakeTensors go through:
each operation of the model is there, with its shapes and dtypes, and nothing is computed or held.
"""

import copy
import weakref
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.divergences import Logits, summed_losses
from utils.engine import enable_checkpointing
from utils.model import empty_model
from utils.model_settings import quiet

PAIR_HEADS = {"seq_relationship", "sop_classifier"}
PAIR_MODULES = {"pooler", *PAIR_HEADS}
# NF4 with its scales quantized too (Dettmers et al. 2023, QLoRA): 4 bits, for each 64 weights
# 8 bits of scale, and for each 256 scales 32 bits
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes of state a parameter by `optim`: of layers, of embeddings. Adam has two moments; in 8 bits
# there is for each 256 of them a scale of 32 bits
OPTIMIZER_BYTES = {
    "adamw_torch_fused": (8, 8),
    "adamw_bnb_8bit": (2 * (1 + 4 / 256), 8),
    "adamw_bf16": (4, 4),
    "muon": (4, 8),
    "adafactor": (0, 0),  # a number for each row and each column
    "lion_32bit": (4, 4),
    "sgd": (4, 4),
}
# of what eager execution holds a row: a Llama of 125M on an H200, benchmarks/results/gpu_speed.md
COMPILED = 0.6


def parameter_count(config: Any, auto_model: Any = None) -> dict[str, int]:
    """The parameters of an `empty_model`: exact for every architecture; tied weights count once.

    Returns:
        "total"; "embeddings", of tokens, positions and types, the tied ones too;
        "without_input_embeddings": less every embedding that is only looked up, by token
        or by position (a matrix tied to the output projection multiplies there, and stays);
        "head": of these, what comes after the base model, to the matrix of the logits;
        "pair_head": of these, what only the first token of a pair of segments goes through (BERT's
        pooler and its classifier); "computed_again": where layers share their weights (ALBERT),
        what each use after the first would add.
    """
    model = empty_model(config, auto_model)
    output = model.get_output_embeddings()
    embeddings = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    lookups = embeddings - (set() if output is None else {output.weight})
    parameters = dict(model.named_parameters())
    pair_head = {w for name, w in parameters.items() if {*name.split(".")} & PAIR_MODULES}
    head = {*parameters.values()} - {*model.base_model.parameters()} - pair_head
    head |= set() if output is None else {output.weight}  # may be tied to the base model
    total = count_parameters(parameters.values())
    return {
        "total": total,
        "embeddings": count_parameters(embeddings),
        "without_input_embeddings": total - count_parameters(lookups),
        "head": count_parameters(head),
        "pair_head": count_parameters(pair_head),
        "computed_again": _computed_again(model),
    }


def count_parameters(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _computed_again(model: torch.nn.Module) -> int:
    groups = getattr(model.config, "num_hidden_groups", None)
    if not groups:
        return 0
    shared = (p for name, p in model.named_parameters() if "layer_groups" in name)
    uses = model.config.num_hidden_layers / groups
    return round((uses - 1) * count_parameters(shared))


def state_bytes(
    parts: dict[str, int],
    layout: Literal["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"],
    world_size: int,
    mixed_precision: str,
    *,
    offload: bool = False,
    half_frozen: bool = False,
    load_in_4bit: bool = False,
    optim: str = "adamw_torch_fused",
) -> dict[str, int]:
    """Bytes on each GPU that training holds from step to step.

    After ZeRO (Rajbhandari et al. 2020, section 3.1), as DeepSpeed 0.19 keeps them. Bytes for a
    trained parameter with AdamW, before ZeRO splits them over the processes (stage 1 the optimizer,
    stage 2 the gradients too, stage 3 and FSDP2 all three, and what is frozen):

                             weights  gradients  optimizer
        ZeRO, fp32              4         4      4 + 8 (a second copy of the weights, moments)
        ZeRO, bf16 or fp16      2         2      4 + 8 (fp32 master weights, moments)
        DDP and FSDP2, any      4         4          8 (autocast keeps the weights in fp32)
        DDP, adamw_bf16         2         4          4

    Gradients accumulate in the precision of the weights, unless the DeepSpeed config sets
    `data_types.grad_accum_dtype`. Not counted: activations, communication buckets, and the fp32
    copy of its gradients that a process makes while it steps.

    Args:
        parts: numbers of parameters: "trained", and of them "embeddings"; where a part is frozen
            also "frozen", and of it "quantizable".
        mixed_precision: "no", "bf16" or "fp16".
        offload: as in ds_configs/zero2_offload.json and zero3_offload.json: gradients and
            optimizer are in the host's memory, under stage 3 the weights too.
        half_frozen: whether frozen weights are kept in 16 bits under DDP.
        optim: of `OPTIMIZER_BYTES`.

    Returns:
        "frozen" (where `parts` has it), "weights" (trained), "gradients" and "optimizer".
    """
    stages = {"DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3, "FSDP2": 3}
    if layout not in stages or mixed_precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"no such setting: {layout=}, {mixed_precision=}")
    trained, is_half, is_zero = parts["trained"], mixed_precision != "no", "ZeRO" in layout
    width = 2 if is_zero and is_half else 4
    width_of_weights = 2 if optim == "adamw_bf16" else width
    of_layers, of_embeddings = OPTIMIZER_BYTES[optim]
    embeddings = parts.get("embeddings", 0)
    optimizer = round((trained - embeddings) * of_layers + embeddings * of_embeddings)
    optimizer += 4 * trained * is_zero
    # what: bytes, and the first stage that splits them
    sizes = {"weights": (trained * width_of_weights, 3), "gradients": (trained * width, 2)}
    sizes["optimizer"] = (optimizer, 1)
    if "frozen" in parts:
        width = 2 if is_half and (is_zero or half_frozen) else 4
        quantized = round(parts["quantizable"] * (width - NF4_BYTES)) if load_in_4bit else 0
        sizes = {"frozen": (parts["frozen"] * width - quantized, 3), **sizes}
    state = {}
    for name, (size, first_split) in sizes.items():
        in_host_memory = offload and (first_split < 3 or layout == "ZeRO-3")
        processes = world_size if stages[layout] >= first_split else 1
        state[name] = 0 if in_host_memory else -(-size // processes)
    return state


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, from `held` on: `now`, and at most `peak`.

    A storage counts once, however many tensors see it, until nothing holds it any more.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self.storages: dict[int, weakref.ref] = {}
        for tensor in held:
            self._note(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        return output

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.storages:
            return

        def forget(_: weakref.ref) -> None:
            del self.storages[key]
            self.now -= size

        self.storages[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


class Activations(NamedTuple):
    """Bytes of forward and of backward: of a micro-batch whatever its size, and of each row."""

    forward: tuple[float, float]
    backward: tuple[float, float]

    def of(self, rows: int) -> int:
        return round(max(fixed + rows * a_row for fixed, a_row in self))

    def rows(self, room: float) -> int:
        """The most that `room` bytes hold."""
        return max(0, min(int((room - fixed) // max(a_row, 1)) for fixed, a_row in self))


def activations(
    build: Callable[[Any], torch.nn.Module],
    config: Any,
    sequence_length: int,
    mixed_precision: str,
    is_causal: bool = True,
    predicted: float = 1.0,
) -> dict[tuple[str, bool], Activations]:
    """The most that is held at once beside weights and gradients, all of which a step's second
    micro-batch meets; the copies of the weights that autocast makes are part of it.

    Of deep models two shallow ones are gone through: what the second has more than the first, all
    further layers have as well.

    Args:
        build: config → the model, without storage.
        is_causal: the loss is `summed_losses`, which holds some chunks of the logits; else the
            logits of the `predicted` share of the tokens are held.

    Returns:
        By ("eager", "compiled" or "checkpointed", whether the weights are in 16 bits and there is
        no autocast, as under ZeRO).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # half a second

    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    depths = _depths(config, depth)
    further = (depth - depths[-1]) / max(1, depths[-1] - depths[0])
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    known = {}
    for is_half, is_checkpointed in product({False, dtype is not None}, (False, True)):
        peaks = []  # (forward, backward) for one row, and for two
        for rows in (1, 2):
            found = []
            for layers in depths:
                with quiet():
                    model = build(_of_depth(config, layers))
                    if is_checkpointed:
                        enable_checkpointing(model)
                with FakeTensorMode():
                    _on_cpu(model, dtype if is_half else None)
                    autocast = None if is_half else dtype
                    shape = (rows, sequence_length)
                    found.append(_peaks(model, shape, autocast, is_causal, predicted))
            pairs = zip(found[0], found[-1], strict=True)
            peaks.append([last + further * (last - first) for first, last in pairs])
        pairs = [(2 * one - two, two - one) for one, two in zip(*peaks, strict=True)]
        known["checkpointed" if is_checkpointed else "eager", is_half] = Activations(*pairs)
        if not is_checkpointed:
            compiled = ((fixed, COMPILED * a_row) for fixed, a_row in pairs)
            known["compiled", is_half] = Activations(*compiled)
    return known


def _on_cpu(model: Any, dtype: torch.dtype | None) -> None:
    """The model's tensors, in place, each once however many modules share it; in `dtype`, if given.

    Autocast leaves those of the meta device as they are.
    """
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for name, old in module._parameters.items():
            if old is not None and old not in made:
                new = torch.empty(old.shape, dtype=dtype or old.dtype)
                made[old] = torch.nn.Parameter(new, requires_grad=old.requires_grad)
            module._parameters[name] = made.get(old)


def _depths(config: Any, depth: int) -> list[int]:
    """Of the shallow models; the kinds of layers repeat after six at most."""
    period = 6 if len(set(getattr(config.get_text_config(), "layer_types", None) or ())) > 1 else 2
    return [depth] if depth <= 2 * period else [period, 2 * period]


def _of_depth(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = getattr(text, "num_hidden_layers", 0)
    if layers != depth:
        for name, value in vars(text).items():
            if isinstance(value, list) and len(value) == depth:
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
    return config


def _peaks(
    model: Any,
    shape: tuple[int, int],
    autocast: torch.dtype | None,
    is_causal: bool,
    predicted: float,
) -> tuple[int, int]:
    """Of forward and backward."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    tokens = torch.zeros(shape, dtype=torch.long)
    mask = torch.ones(shape[0], 1, shape[1], shape[1], dtype=torch.bool)  # of packed documents
    entering: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        entering.append(inputs[0])
        return (inputs[0][:, :1],)

    def choose(_: torch.nn.Module, __: Any, output: Any) -> Any:
        chosen = torch.arange(max(1, round(predicted * tokens.numel())))
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[chosen][None]
        return output

    layer = model.get_output_embeddings()
    if is_causal:
        layer.register_forward_pre_hook(keep)
    else:
        model.base_model.register_forward_hook(choose)
    model.train()
    for module in model.modules():
        # dropout of scores: a GPU's kernels hold nothing for it, a CPU's all scores
        module.training = "Attention" not in type(module).__name__
    gradients = [parameter.grad for parameter in trained]
    with LiveBytes([*model.parameters(), *gradients, *model.buffers(), tokens]) as live:
        start = live.now
        casts = torch.autocast("cpu", dtype=autocast, enabled=autocast is not None)
        with casts:
            flags = {"use_cache": False} if is_causal else {}
            output = model(input_ids=tokens, attention_mask=mask, **flags)
            if is_causal:
                cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
                hidden = entering.pop().flatten(0, 1)
                logits = Logits(hidden, layer.weight, layer.bias, cap=cap)
                loss = summed_losses(logits, tokens.flatten())[0]
            else:
                logits = output.get("prediction_logits", output.get("logits"))[0].float()
                loss = cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        del output, logits
        hidden = None
        forward, live.peak = live.peak - start, live.now
        loss.backward()
    return forward, live.peak - start
