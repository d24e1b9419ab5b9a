"""One process at a time writes, and what is read is what was written."""

import errno
import fcntl
import functools
import gc
import os
import socket
import weakref
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path

from utils.config import InputError
from utils.usage import warn

_warn_once = functools.cache(warn)


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
        if Lock.held.setdefault(real, holder) is not holder:
            raise self._in_use(Lock.held[real])
        made = [folder for folder in self.file.parents if not folder.exists()]
        opened: list[int] = []
        self.close = weakref.finalize(self, _give_back, real, opened, made, os.getpid())
        try:
            if made:
                self.file.parent.mkdir(parents=True, exist_ok=True)
            while not opened:
                opened += self._locked()
        except BaseException:
            self.close()
            raise
        self.descriptor = opened[0]
        with suppress(OSError):  # no space: it is held all the same
            os.pwrite(self.descriptor, f"{holder}\n".encode(), 0)
            os.ftruncate(self.descriptor, len(holder) + 1)
            os.fsync(self.descriptor)

    def problem(self) -> str:
        """Why it is not held any more, or ""."""
        if _is_open(self.file, self.descriptor) and self._take(self.descriptor):
            return ""
        return (
            f"{self.file} is not of this run any more: {self.what} was removed or replaced, or "
            "another run was let in. This one ends and leaves it alone"
        )

    def _locked(self) -> list[int]:
        """The descriptor; none where the process that held the file has removed it in the end."""
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        is_taken = self._take(descriptor)
        if is_taken and _is_open(self.file, descriptor):
            return [descriptor]
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        if not is_taken:
            raise self._in_use(holder or "another process")
        return []

    def _take(self, descriptor: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            _warn_once(f"{self.file}: {error.strerror}: nothing keeps a second start out")
        return True

    def _in_use(self, holder: str) -> InputError:
        return InputError(
            f"{self.what} is in use by {holder}: wait for it, stop it, or write elsewhere. "
            f"If there is no such process any more, remove {self.file}"
        )


def _is_open(file: Path, descriptor: int) -> bool:
    """Whether it is the file of this name."""
    with suppress(OSError):
        return os.path.samestat(file.lstat(), os.fstat(descriptor))
    return False


def _give_back(file: Path, opened: list[int], made: list[Path], holder: int) -> None:
    if os.getpid() != holder:  # in a process that was forked
        return
    del Lock.held[file]
    for descriptor in opened:
        with suppress(OSError):
            if _is_open(file, descriptor):
                file.unlink()
        os.close(descriptor)
    with suppress(OSError):  # something was written there
        for folder in made:
            folder.rmdir()


def locked(path: Path) -> closing:
    """While this process writes what is to stand at `path`; raises as `Lock`."""
    return closing(Lock(path.with_name(f".{path.name}.lock"), path))
