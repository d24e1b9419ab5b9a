"""Checkpoints that any number of processes and any ZeRO stage can read, written without gathering.

A rank stores what it owns: a 1-D fragment of each parameter and of the optimizer's tensors of it
(for Adam `exp_avg` and `exp_avg_sq`), in full precision, with the place in the parameter where the
fragment begins. A rank that resumes reads the slices that make up its own fragments, however they
were cut when they were written. There is no conversion and no rank holds a whole model.

    checkpoints/step-00000020/
        rank-00000-of-00002.safetensors   "exp_avg/model.norm.weight": the fragment
        constants.safetensors             what no gradient changes: buffers, and parameters that
                                          stay as they are where no base model holds them
        state.json                        counters, stream state, loss scale, sizes of the files
        config.json, tokenizer.json …     the model's configuration and its tokenizer

A folder is written under another name, synced and renamed: with its name it is complete.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from utils.config import InputError
from utils.files import written_aside
from utils.fragments import (
    SCALES,
    constants,
    fragments,
    gathered,
    get_rank,
    get_world_size,
    make_optimizer_state,
    refresh_model,
    spread_like,
    trainable,
)

CONSTANTS = "constants.safetensors"
STATE = "state.json"


class CheckpointError(Exception):
    """A checkpoint could not be written; earlier ones are untouched."""


def newest(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    return max(_checkpoints(output_dir), key=_step, default=None)


def folder_of(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return Path(output_dir, "checkpoints", f"step-{step:08d}")


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, after checking that every file of it is whole.

    Raises:
        InputError: no checkpoint; a file is missing or has another size than when it was written.
    """
    if not folder.is_dir():
        raise InputError(f"no checkpoint {folder}")
    try:
        state = json.loads((folder / STATE).read_text())
        for name, size in state["files"].items():
            found = (folder / name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} bytes, not {size}")
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, error) from None
    return state


def _damaged(folder: Path, problem: Any) -> InputError:
    return InputError(
        f"{folder} is damaged: {problem}. Remove it to resume from the checkpoint before it"
    )


def save(
    folder: Path,
    model: torch.nn.Module,
    optimizer: Any,
    state: dict[str, Any],
    write_more: Any = None,
) -> None:
    """Write a checkpoint; every rank calls this, the state of rank 0 counts.

    Args:
        write_more: called by rank 0 with the folder, for files of its own.

    Raises:
        CheckpointError: on every rank, when any rank could not write (no space left, say).
    """
    rank, world_size = get_rank(), get_world_size()
    partial = folder.with_name(f".{folder.name}.partial")
    error = ""
    if rank == 0:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as problem:
            error = str(problem)
    _raise_together(error)
    kept = _whole_constants(model, state.get("base_model") is None)
    file = partial / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
    try:
        tensors, starts = {}, {}
        for fragment in fragments(model, optimizer):
            starts[fragment.name] = fragment.start
            for kind, tensor in fragment.tensors.items():
                tensors[f"{kind}/{fragment.name}"] = tensor.detach().cpu()
        save_file(tensors, file, metadata={"starts": json.dumps(starts)})
        _sync(file)
        if kept:
            save_file(kept, partial / CONSTANTS)
    except (OSError, SafetensorError) as problem:
        error = str(problem)
    try:
        _raise_together(error)
        if rank == 0:
            try:
                if write_more is not None:
                    write_more(partial)
                state = {**state, "files": {f.name: f.stat().st_size for f in partial.iterdir()}}
                (partial / STATE).write_text(json.dumps(state))
                _sync(*partial.iterdir(), partial)
                partial.rename(folder)  # fails where there is one: none is ever replaced
                _sync(folder.parent)
            except Exception as problem:  # tokenizers know no OSError
                error = str(problem)
        _raise_together(error)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def update(folder: Path, state: dict[str, Any]) -> None:
    """Write what has become known of a step after its checkpoint; one process calls this."""
    with suppress(OSError), written_aside(folder / STATE) as file:  # no space: it stays as it is
        file.write_text(json.dumps(json.loads((folder / STATE).read_text()) | state))
        _sync(file)


def _whole_constants(model: torch.nn.Module, parameters: bool) -> dict[str, torch.Tensor]:
    """On rank 0; all ranks call it."""
    whole = {}
    for name, tensor in constants(model, parameters):
        with gathered([tensor]):
            values = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if get_rank() == 0:
                whole[name] = values.detach().cpu().clone()
    return whole


def prune(
    output_dir: str | Path, keep_last: int, keep_every: int | None, best_step: int | None = None
) -> None:
    """Remove all but the newest checkpoints, the best and those whose step `keep_every` divides."""
    for folder in sorted(_checkpoints(output_dir), key=_step)[:-keep_last]:
        is_kept = keep_every and _step(folder) % keep_every == 0
        if not is_kept and _step(folder) != best_step:
            # renamed first: a kill while it is being removed leaves no half checkpoint
            doomed = folder.with_name(f".{folder.name}.partial")
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def load(folder: Path, model: torch.nn.Module, optimizer: Any, optimizer_step: int) -> None:
    """Fill the fragments of this rank from a checkpoint of any world size and ZeRO stage.

    Raises:
        InputError: a parameter of the model is missing there, or has another size.
    """
    make_optimizer_state(optimizer, optimizer_step)
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in trainable(model)}
    with _opened(folder) as pieces:
        updated = {key.partition("/")[2] for key in pieces if not key.startswith("parameter/")}
        for name, start, tensors in fragments(model, optimizer, every_rank=True):
            for kind, tensor in tensors.items():
                held = pieces.get(f"{kind}/{name}", [])
                if kind != "parameter" and name not in updated:
                    continue  # zeros: it never had a gradient, or all steps so far were skipped
                size = tensor.numel() if kind in SCALES else sizes[name]
                if not _fill(tensor, start, held, size):
                    raise InputError(f"{folder} does not hold {kind} of {name} in this size")
    refresh_model(optimizer)
    held = read_constants(folder)
    for name, tensor in constants(model, parameters=True):
        if name in held:
            with gathered([tensor], modify=True), torch.no_grad():
                if tensor.shape != held[name].shape:
                    raise InputError(f"{folder} does not hold {name} in this size")
                tensor.copy_(spread_like(tensor, held[name]))


def read_constants(folder: Path) -> dict[str, torch.Tensor]:
    """By name, what a checkpoint holds beside what was trained; on the CPU."""
    try:
        return load_file(folder / CONSTANTS) if (folder / CONSTANTS).exists() else {}
    except SafetensorError as error:
        raise _damaged(folder, f"{CONSTANTS}: {error}") from None


def read_parameters(folder: Path, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Any]]:
    """Whole fp32 parameters of a checkpoint, one by one, on the CPU."""
    with _opened(folder) as pieces:
        for name, shape in shapes.items():
            tensor = torch.empty(shape.numel())
            if not _fill(tensor, 0, pieces.get(f"parameter/{name}", []), tensor.numel()):
                raise InputError(f"{folder} does not hold {name} in the shape {tuple(shape)}")
            yield name, tensor.view(shape)


def parameter_names(folder: Path) -> set[str]:
    """Of the parameters that a checkpoint holds: those that were trained."""
    with _opened(folder) as pieces:
        keys = (key.partition("/") for key in pieces)
        return {name for kind, _, name in keys if kind == "parameter"}


@contextmanager
def _opened(folder: Path) -> Iterator[dict[str, list[tuple[int, Any]]]]:
    """Key → [(start, slice of the fragment)], over the files of a checkpoint."""
    pieces: dict[str, list[tuple[int, Any]]] = {}
    for path in sorted(folder.glob("rank-*.safetensors")):
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise _damaged(folder, f"{path.name}: {error}") from None
        starts = json.loads(file.metadata()["starts"])
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            start = starts[key.partition("/")[2]]
            pieces.setdefault(key, []).append((start, file.get_slice(key)))
    yield pieces


def _fill(target: torch.Tensor, start: int, pieces: list[tuple[int, Any]], size: int) -> bool:
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


def _raise_together(error: str) -> None:
    errors = [error]
    if get_world_size() > 1:
        errors = [""] * get_world_size()
        dist.all_gather_object(errors, error)
    if any(errors):
        raise CheckpointError(next(e for e in errors if e))


def _sync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _checkpoints(output_dir: str | Path) -> list[Path]:
    return [f for f in Path(output_dir, "checkpoints").glob("step-*") if _step(f) is not None]


def _step(folder: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{8,})", folder.name)
    return int(match[1]) if match else None
