"""Checkpoints that any number of processes and any ZeRO stage can read, written without gathering.

A rank stores what it owns: a 1-D fragment of each parameter and of the optimizer's tensors of it
(for Adam `exp_avg` and `exp_avg_sq`), in full precision, with the place in the parameter where the
fragment begins. A rank that resumes reads the slices that make up its own fragments, however they
were cut when they were written. There is no conversion and no rank holds a whole model.

    checkpoints/step-00000020/
        rank-00000-of-00002.safetensors   "exp_avg/model.norm.weight": the fragment
        constants.safetensors             what no gradient changes: buffers, and parameters that
                                          stay as they are where no base model holds them
        state.json                        counters, stream state, loss scale, sizes and checksums
                                          (xxh3_64) of the files, and of itself
        config.json, tokenizer.json …     the model's configuration and its tokenizer

A folder is written under another name, synced and renamed: with its name it is complete.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from utils.config import InputError
from utils.files import grant, remove, sync, written_aside
from utils.fragments import (
    constants,
    fill,
    fragments,
    gather,
    gathered,
    get_rank,
    get_world_size,
    make_optimizer_state,
    refresh_model,
    spread_like,
    trainable,
    whole_constants,
)
from utils.integrity import changed_file, size_and_checksum
from utils.program import warn

CONSTANTS = "constants.safetensors"
STATE = "state.json"


class CheckpointError(Exception):
    """A checkpoint could not be written; earlier ones are untouched."""


def newest(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint; raises InputError where one's name is that of a file."""
    found = sorted(_checkpoints(Path(output_dir, "checkpoints")), key=_step)
    for path in found:
        if not path.is_dir():
            raise InputError(f"{path} is no folder, as checkpoints are: remove it")
    return found[-1] if found else None


def earlier(folder: Path) -> list[Path]:
    """The checkpoints of a run before this one, the newest first."""
    found = [path for path in _checkpoints(folder.parent) if _step(path) < (_step(folder) or 0)]
    return sorted(found, key=_step, reverse=True)


def folder_of(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return Path(output_dir, "checkpoints", f"step-{step:08d}")


class State(dict):
    """Of a checkpoint; a key that it lacks raises InputError."""

    folder: Path

    def __missing__(self, key: str) -> None:
        raise _damaged(self.folder, f"{STATE} has no {key!r}")


def read_state(folder: Path) -> State:
    """The state of a checkpoint, which is whole; raises InputError unless its files are there,
    can be read, and have their sizes."""
    try:
        if not folder.is_dir():
            raise InputError(f"no checkpoint {folder}")
        text = (folder / STATE).read_text(encoding="utf-8")
        state = State(json.loads(text))
        state.folder = folder
        # earlier there were sizes alone
        is_sealed = any(isinstance(kept, list) for kept in state["files"].values())
        if is_sealed and text != _sealed("{" + text[len(_sealed("")) :]):
            raise ValueError("it is not what was written")
        for name, kept in state["files"].items():
            with (folder / name).open("rb") as file:
                found = file.seek(0, os.SEEK_END)
            if found != (size := kept[0] if isinstance(kept, list) else kept):
                raise _damaged(folder, f"{name} has {found} bytes, not {size}")
    except OSError as error:
        raise _damaged(folder, error) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder, f"{STATE}: {error}") from None
    return state


def verify(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Raises InputError unless the files of a checkpoint, a rank's share, are what was written."""
    kept = read_state(folder)["files"]
    names = sorted(kept, key=lambda name: (not name.startswith("rank-"), name))  # first: its own
    share = {n: kept[n][1] for n in names[rank::world_size] if isinstance(kept[n], list)}
    try:
        changed = changed_file(folder, share)
    except OSError as error:
        raise _damaged(folder, error) from None
    if changed:
        raise _damaged(folder, f"{changed} is not what was written")


def _damaged(folder: Path, problem: Any) -> InputError:
    if isinstance(problem, PermissionError):
        return InputError(f"cannot read {problem.filename}: {problem.strerror}: ask its owner")
    if isinstance(problem, OSError):
        problem = f"{Path(problem.filename or '').name}: {problem.strerror}"
    before = next(iter(earlier(folder)), None)
    remedy = f"go on from {before}" if before else "begin again: there is none before it"
    return InputError(f"{folder} is damaged: {problem}. Remove it to {remedy}")


def _sealed(text: str) -> str:
    """A JSON object with its checksum before its first key."""
    return f'{{"checksum": "{xxhash.xxh3_64_hexdigest(text.encode())}", {text[1:]}'


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    rest = {key: value for key, value in state.items() if key != "checksum"}
    with written_aside(folder / STATE) as file:
        file.write_text(_sealed(json.dumps(rest)), encoding="utf-8")
        sync(file)


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
            remove(partial)
            partial.mkdir(parents=True)
        except OSError as problem:
            error = str(problem)
    _raise_together(error)
    mine: dict[str, list] = {}
    kept = whole_constants(model, state.get("base_model") is None)
    file = partial / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
    try:
        tensors, starts = {}, {}
        for fragment in fragments(model, optimizer):
            starts[fragment.name] = fragment.start
            for kind, tensor in fragment.tensors.items():
                tensors[f"{kind}/{fragment.name}"] = tensor.detach().cpu()
        save_file(tensors, file, metadata={"starts": json.dumps(starts)})
        grant(file)
        sync(file)
        if kept:
            save_file(kept, partial / CONSTANTS)
        mine = {file.name: size_and_checksum(file)}
    except (OSError, SafetensorError) as problem:
        error = str(problem)
    try:
        files = _raise_together(error, mine)
        if rank == 0:
            try:
                if write_more is not None:
                    write_more(partial)
                grant(partial)
                for path in filter(Path.is_file, partial.rglob("*")):
                    if path.name not in files:
                        files[str(path.relative_to(partial))] = size_and_checksum(path)
                _write_state(partial, {**state, "files": files})
                sync(*partial.rglob("*"), partial)
                partial.rename(folder)  # fails where there is one: none is ever replaced
                sync(folder.parent)
            except Exception as problem:  # tokenizers know no OSError
                error = str(problem)
        _raise_together(error)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def update(folder: Path, state: dict[str, Any]) -> None:
    """Write what has become known of a step after its checkpoint; one process calls this."""
    try:
        _write_state(folder, read_state(folder) | state)
    except (OSError, InputError) as error:  # it stays as it is: what is damaged, too
        warn(str(error))


@contextmanager
def added(folder: Path, name: str) -> Iterator[Path]:
    """Where to write a file that comes to a checkpoint later, which is whole at any moment."""
    state = read_state(folder)
    files = {file: kept for file, kept in state["files"].items() if file != name}
    _write_state(folder, state | {"files": files})
    with written_aside(folder / name) as file:
        yield file
    files[name] = size_and_checksum(folder / name)
    _write_state(folder, state | {"files": files})


def prune(
    output_dir: str | Path, keep_last: int, keep_every: int | None, best_step: int | None = None
) -> None:
    """Remove all but the newest checkpoints, the best and those whose step `keep_every` divides."""
    found = filter(Path.is_dir, _checkpoints(Path(output_dir, "checkpoints")))
    for folder in sorted(found, key=_step)[:-keep_last]:
        is_kept = keep_every and _step(folder) % keep_every == 0
        if not is_kept and _step(folder) != best_step:
            # renamed first: a kill while it is being removed leaves no half checkpoint
            doomed = folder.with_name(f".{folder.name}.partial")
            folder.rename(doomed)
            with suppress(OSError):
                remove(doomed)


def load(folder: Path, model: torch.nn.Module, optimizer: Any, optimizer_step: int) -> None:
    """Fill the fragments of this rank from a checkpoint of any world size and ZeRO stage.

    All ranks call it. While they read, they verify the files, each its share.

    Raises:
        InputError: on every rank, when any found that a file is damaged or cannot be read, or that
            a parameter of the model is missing there, or has another size.
    """
    failure: Exception | None = None
    with ThreadPoolExecutor() as pool:
        verified = pool.submit(verify, folder, get_rank(), get_world_size())
        try:
            _fill_fragments(folder, model, optimizer, optimizer_step)
        except Exception as error:  # a damaged file may raise anything
            failure = error
        failure = verified.exception() or failure
    problems = gather(failure and (str(failure) or repr(failure)))
    if any(problems):
        raise failure or InputError(next(filter(None, problems)))
    refresh_model(optimizer)
    held = read_constants(folder)
    for name, tensor in constants(model, parameters=True):
        if name in held:
            with gathered([tensor], modify=True), torch.no_grad():
                if tensor.shape != held[name].shape:
                    raise InputError(f"{folder} does not hold {name} in this size")
                tensor.copy_(spread_like(tensor, held[name]))


def _fill_fragments(folder: Path, model: torch.nn.Module, optimizer: Any, step: int) -> None:
    make_optimizer_state(optimizer, step)
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in trainable(model)}
    with _opened(folder) as pieces:
        updated = {key.partition("/")[2] for key in pieces if not key.startswith("parameter/")}
        for name, start, tensors in fragments(model, optimizer, every_rank=True):
            is_whole = tensors["parameter"].numel() == sizes[name]
            for kind, tensor in tensors.items():
                held = pieces.get(f"{kind}/{name}", [])
                if kind != "parameter" and name not in updated:
                    continue  # zeros: it never had a gradient, or all steps so far were skipped
                size = tensor.numel() if is_whole else sizes[name]
                if not fill(tensor, start, held, size):
                    raise InputError(f"{folder} does not hold {kind} of {name} in this size")


def read_constants(folder: Path) -> dict[str, torch.Tensor]:
    """By name, what a checkpoint holds beside what was trained; on the CPU."""
    try:
        return load_file(folder / CONSTANTS) if (folder / CONSTANTS).exists() else {}
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, f"{CONSTANTS}: {error}") from None


def read_parameters(folder: Path, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Any]]:
    """Whole fp32 parameters of a checkpoint, one by one, on the CPU."""
    with _opened(folder) as pieces:
        for name, shape in shapes.items():
            tensor = torch.empty(shape.numel())
            if not fill(tensor, 0, pieces.get(f"parameter/{name}", []), tensor.numel()):
                raise InputError(f"{folder} does not hold {name} in the shape {tuple(shape)}")
            yield name, tensor.view(shape)


def parameter_names(folder: Path) -> set[str]:
    """Of the parameters that a checkpoint holds: those that were trained."""
    with _opened(folder) as pieces:
        return {k.removeprefix("parameter/") for k in pieces if k.startswith("parameter/")}


@contextmanager
def _opened(folder: Path) -> Iterator[dict[str, list[tuple[int, Any]]]]:
    """Key → [(start, slice of the fragment)], over the files of a checkpoint."""
    pieces: dict[str, list[tuple[int, Any]]] = {}
    for path in sorted(folder.glob("rank-*.safetensors")):
        try:
            file = safe_open(path, framework="pt")
            starts = json.loads(file.metadata()["starts"])
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                start = starts[key.partition("/")[2]]
                pieces.setdefault(key, []).append((start, file.get_slice(key)))
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise _damaged(folder, f"{path.name}: {error}") from None
    yield pieces


def _raise_together(error: str, found: Any = ()) -> dict[str, Any]:
    """What all ranks have found, together."""
    errors, parts = zip(*gather((error, dict(found))), strict=True)
    if any(errors):
        raise CheckpointError(next(filter(None, errors)))
    return {name: value for part in parts for name, value in part.items()}


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if _step(path) is not None]


def _step(folder: Path) -> int | None:
    match = re.fullmatch(r"step-(\d{8,})", folder.name)
    return int(match[1]) if match else None
