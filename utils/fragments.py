"""What this process owns of the parameters and of the optimizer's state, however they are spread.

One process, DistributedDataParallel, FSDP2 and DeepSpeed ZeRO 1 to 3 keep them in different places.
"""

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# of an optimizer's state: what is counted apart, and the tables of 8-bit numbers (bitsandbytes)
LEFT_OUT = ("step", "qmap1", "qmap2")


class Fragment(NamedTuple):
    """What this process owns of one parameter: a range of its elements, flattened."""

    name: str
    start: int
    tensors: dict[str, torch.Tensor]  # "parameter" and the optimizer's: 1-D views of live storage


def fragments(
    model: torch.nn.Module, optimizer: Any, every_rank: bool = False
) -> Iterator[Fragment]:
    """The fragments of the trainable parameters that this process owns, in the model's order.

    Where every rank owns everything (no ZeRO), the parameters are dealt out, unless `every_rank`.
    """
    from torch.distributed.tensor import DTensor  # takes a second
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    zero = zero_optimizer(optimizer)
    for index, (name, parameter) in enumerate(trainable(model)):
        if isinstance(parameter, DTensor):  # FSDP2: rows of the parameter
            rows = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )[1][0]
            state = _torch_optimizer(optimizer).state.get(parameter, {})
            local = {k: v.to_local() for k, v in state.items() if isinstance(v, DTensor)}
            flat = parameter.to_local()
            if flat.numel():
                start = rows * parameter.shape[1:].numel()
                yield Fragment(name, start, _views(flat, local, 0, flat.numel()))
        elif zero is None:
            if every_rank or index % get_world_size() == get_rank():
                state = _torch_optimizer(optimizer).state.get(parameter, {})
                kept = {k: v for k, v in state.items() if torch.is_tensor(v) and k not in LEFT_OUT}
                kept = {"parameter": parameter, **kept}  # of any shapes: sums over rows, say
                yield Fragment(name, 0, {k: v.detach().view(-1) for k, v in kept.items()})
        elif hasattr(parameter, "ds_id"):
            group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            flat = zero.fp32_partitioned_groups_flat[group]
            start = length * zero._get_param_partition_rank(parameter)
            # the last partitions are padded
            length = max(0, min(length, parameter.ds_numel - start))
            if length:
                yield Fragment(
                    name, start, _views(flat, zero.optimizer.state[flat], offset, length)
                )
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            place = mapping.hp_fragment_address
            views = _views(flat, zero.optimizer.state[flat], place.start, place.numel)
            yield Fragment(name, mapping.lp_fragment_address.start, views)


def _views(flat: torch.Tensor, state: dict, start: int, length: int) -> dict[str, torch.Tensor]:
    tensors = {"parameter": flat}
    tensors |= {k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == flat.shape}
    return {k: v.detach().view(-1).narrow(0, start, length) for k, v in tensors.items()}


def trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def constants(model: torch.nn.Module, parameters: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """What is saved though no gradient changes it: buffers, and if `parameters` is set those that
    are not trained."""
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    if parameters:
        yield from ((name, p) for name, p in model.named_parameters() if not p.requires_grad)


def whole_constants(model: torch.nn.Module, parameters: bool) -> dict[str, torch.Tensor]:
    """On rank 0; all ranks call it."""
    whole = {}
    for name, tensor in constants(model, parameters):
        with gathered([tensor]):
            values = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if get_rank() == 0:
                whole[name] = values.detach().cpu().clone()
    return whole


def spread_like(target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Whole values, as FSDP2 spreads the target over the ranks if it does."""
    if not hasattr(target, "device_mesh"):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.to(target.device), target.device_mesh, target.placements)


def gathered(parameters: list[torch.nn.Parameter], modify: bool = False) -> Any:
    """A context in which ZeRO-3 parameters are whole; nothing to do for others."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return torch.no_grad()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None)


def zero_optimizer(optimizer: Any) -> Any:
    """DeepSpeed's ZeRO optimizer inside what Accelerate handed back, if there is one."""
    inner = getattr(optimizer, "optimizer", optimizer)
    is_zero = hasattr(inner, "single_partition_of_fp32_groups")
    return inner if is_zero or hasattr(inner, "fp32_partitioned_groups_flat") else None


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def make_optimizer_state(optimizer: Any, step: int) -> None:
    """Give a new optimizer the state that it has after `step` updates, as zeros to be filled."""
    zero, inner = zero_optimizer(optimizer), _torch_optimizer(optimizer)
    if zero is None:
        if hasattr(inner, "init_state"):  # bitsandbytes
            inner.check_overrides()
            for index, group in enumerate(inner.param_groups):
                for place, parameter in enumerate(group["params"]):
                    inner.init_state(group, parameter, index, place)
                    inner.state[parameter]["step"] = step
        else:
            _make_state_by_a_step(inner, step)
        return
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        flats = zero.fp32_partitioned_groups_flat
    else:
        flats = zero.single_partition_of_fp32_groups
    accepted = inspect.signature(type(inner).__init__).parameters
    for flat in flats:
        # one update of a single number shows what the optimizer keeps of a parameter
        probe = torch.nn.Parameter(torch.zeros(1, device=flat.device, dtype=flat.dtype))
        probe.grad = torch.zeros_like(probe)
        settings = {k: v for k, v in inner.defaults.items() if k in accepted}
        probing = type(inner)([probe], **settings)
        probing.step()
        for key, value in probing.state[probe].items():
            if key == "step":
                value = torch.full_like(value, step) if torch.is_tensor(value) else step
            elif torch.is_tensor(value) and value.shape == probe.shape:
                value = torch.zeros_like(flat, dtype=value.dtype)
            inner.state[flat][key] = value


def _make_state_by_a_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Gradients of 0 at a learning rate of 0 move nothing, and show what is kept."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            dtype = getattr(parameter, "grad_dtype", None)
            parameter.grad = torch.zeros_like(parameter, dtype=dtype)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for key, value in state.items():
            if key == "step":
                state[key] = torch.full_like(value, step) if torch.is_tensor(value) else step
            elif torch.is_tensor(value):
                value.zero_()


def refresh_model(optimizer: Any) -> None:
    """Let the weights that the model computes with follow the full-precision ones just set."""
    zero = zero_optimizer(optimizer)
    if zero is None:
        return
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    else:
        zero.update_lp_params()


def optimizer_step_count(optimizer: Any) -> int:
    """Updates that the optimizer has made: skipped steps are not among them."""
    states = _torch_optimizer(optimizer).state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def fill(target: torch.Tensor, start: int, pieces: list[tuple[int, Any]], size: int) -> bool:
    """Copy [start, start + length) into the target; whether the pieces hold it and are `size`."""
    copied = held = 0
    for piece_start, piece in pieces:
        length = piece.get_shape()[0]
        held += length
        first, last = max(start, piece_start), min(start + target.numel(), piece_start + length)
        if first < last:
            values = piece[first - piece_start : last - piece_start]
            target[first - start : last - start].copy_(values)
            copied += last - first
    return copied == target.numel() and held == size


def gather(mine: Any) -> list[Any]:
    """What each rank has, on every rank; all call it."""
    everyone = [mine] * get_world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
