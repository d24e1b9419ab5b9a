"""One process at a time writes in a place, and what is read is what was written."""

import errno
import fcntl
import gc
import mmap
import os
import re
import socket
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import xxhash

from utils.config import InputError
from utils.program import warn_once

CHECKSUMS = "checksums.xxh3"  # of the weights beside it; `xxhsum --check` reads it


class Lock:
    """A file that names the process which holds it: until it calls `close`, ends or dies.

    A POSIX record lock: servers of NFS know it, and a process that was forked has no part in it.
    It keeps out other processes alone, and is lost where its own closes the file once more: so
    what is held here is remembered.

    Args:
        what: that is written to meanwhile, for messages.

    Raises:
        InputError: another one holds it, here or elsewhere.
        OSError: there can be no such file.
    """

    held: dict[Path, str] = {}  # noqa: RUF012 (by this process)

    def __init__(self, file: Path, what: Path):
        self.file, self.what = file.absolute(), what
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
        real = self.file.parent.resolve() / file.name
        if real in Lock.held:
            gc.collect()  # of a run that has ended with an error
        if real in Lock.held:
            raise self._in_use(Lock.held[real])
        made = [folder for folder in self.file.parents if not folder.exists()]
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.descriptor = self._take()
        except BaseException:
            _remove_empty(made)
            raise
        Lock.held[real] = holder
        self.close = weakref.finalize(self, _give_back, real, self.descriptor, made, os.getpid())
        with suppress(OSError):  # no space: it is held all the same
            os.pwrite(self.descriptor, f"{holder}\n".encode(), 0)
            os.fsync(self.descriptor)

    def problem(self) -> str:
        """Why it is not held any more, or ""."""
        if self._is_there(self.descriptor) and self._is_locked(self.descriptor):
            return ""
        return (
            f"{self.file} is not of this run any more: {self.what} was removed or replaced, or "
            "another run was let in. This one ends and leaves it alone"
        )

    def _take(self) -> int:
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if self._is_locked(descriptor):
            if self._is_there(descriptor):
                return descriptor
            os.close(descriptor)
            return self._take()  # whoever held it has removed it in the end
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").partition("\n")[0]
        os.close(descriptor)
        raise self._in_use(holder or "another process")

    def _is_there(self, descriptor: int) -> bool:
        with suppress(OSError):
            return os.path.samestat(self.file.lstat(), os.fstat(descriptor))
        return False

    def _is_locked(self, descriptor: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            warn_once(f"{self.file}: {error.strerror}: nothing keeps a second start out")
        return True

    def _in_use(self, holder: str) -> InputError:
        return InputError(
            f"{self.what} is in use by {holder}: wait for it, stop it, or write elsewhere. "
            f"If there is no such process any more, remove {self.file}"
        )


def _give_back(file: Path, descriptor: int, made: list[Path], holder: int) -> None:
    if os.getpid() != holder:  # in a process that was forked
        return
    del Lock.held[file]
    with suppress(OSError):
        if os.path.samestat(file.lstat(), os.fstat(descriptor)):
            file.unlink()
    os.close(descriptor)
    _remove_empty(made)


def _remove_empty(made: list[Path]) -> None:
    with suppress(OSError):  # something was written there
        for folder in made:
            folder.rmdir()


def locked(path: Path) -> closing:
    """While this process writes what is to stand at `path`; raises as `Lock`."""
    return closing(Lock(path.with_name(f".{path.name}.lock"), path))


def checksum(file: Path) -> str:
    """Its xxh3_64, in hexadecimal."""
    with file.open("rb") as stream:
        if not os.fstat(stream.fileno()).st_size:  # an empty file has no map
            return xxhash.xxh3_64_hexdigest(b"")
        with mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as content:
            return xxhash.xxh3_64_hexdigest(content)


def size_and_checksum(file: Path) -> list[Any]:
    return [file.stat().st_size, checksum(file)]


def changed_file(folder: Path, expected: dict[str, str]) -> str | None:
    """The name of a file that has another checksum than is expected; they are read in parallel."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(checksum, (folder / name for name in expected))
        pairs = zip(expected.items(), found, strict=True)
        return next((name for (name, known), value in pairs if known != value), None)


def describe_files(files: list[str], hashed: bool) -> dict[str, list[Any]]:
    """By name, size, time of change in ns and, if wanted, checksum; those elsewhere are left out.

    By the names alone where these tell the files apart: a folder may be moved.
    """
    paths = [Path(file) for file in files if os.path.exists(file)]
    is_unique = len({path.name for path in paths}) == len(paths)
    with ThreadPoolExecutor() as pool:
        checksums = pool.map(checksum, paths) if hashed else [None] * len(paths)
        pairs = zip(paths, (path.stat() for path in paths), checksums, strict=True)
        return {
            (path.name if is_unique else str(path)): [status.st_size, status.st_mtime_ns, known]
            for path, status, known in pairs
        }


def changed_files(was: dict[str, list[Any]], now: dict[str, list[Any]]) -> dict[str, str]:
    """By name, how files differ that `describe_files` has described; by time alone counts too."""
    changes = {}
    for name in sorted({**was, **now}) if was else ():  # older checkpoints describe none
        if name not in now or name not in was:
            changes[name] = "is new" if name in now else "is gone"
        elif now[name][0] != was[name][0]:
            changes[name] = f"had {was[name][0]:,} bytes and has {now[name][0]:,}"
        elif None not in (now[name][2], was[name][2]):
            if now[name][2] != was[name][2]:
                changes[name] = "has another checksum"
        elif now[name][1] != was[name][1]:
            changes[name] = "was written again, with as many bytes"
    return changes


def write_checksums(folder: Path) -> None:
    """Beside weights, what `check_weights` holds them against."""
    files = sorted(folder.glob("*.safetensors"))
    lines = (f"XXH3 ({file.name}) = {checksum(file)}\n" for file in files)
    (folder / CHECKSUMS).write_text("".join(lines))


def check_weights(folder: str | Path) -> None:
    """Raises InputError where a folder tells the checksums of its weights and they have others."""
    file = Path(folder, CHECKSUMS)
    if not file.is_file():
        return
    try:
        lines = re.split(r"(?<=\n)(?=.)", file.read_text())
        pattern = r"XXH3 \((.+)\) = ([0-9a-f]{16})\n"
        changed = changed_file(file.parent, dict(re.fullmatch(pattern, s).groups() for s in lines))
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from None
    except (ValueError, AttributeError):
        raise InputError(f"{file} is damaged: remove it to take the weights as they are") from None
    if changed:
        raise InputError(
            f"{file.parent / changed} is not the file that was written: export or copy it again. "
            f"If it was replaced on purpose, remove {file}"
        )
