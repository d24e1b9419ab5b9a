"""Files anywhere (local, or at a URL that fsspec opens), read in ranges and with patience."""

import functools
import glob
import gzip
import io
import os
import re
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import zstandard
from fsspec.utils import glob_translate

from utils.config import InputError
from utils.program import warn, warn_once

RETRY_SECONDS = (1, 2, 4, 8, 16)  # waits before a read that failed is tried again
REMOTE_BLOCK = 2**21  # bytes of a range that is fetched
BUFFER = 2**18
os.umask(UMASK := os.umask(0))
ZSTD_PIECE = 2**11  # compressed bytes: at most 2**26 come out of them
ZSTD_WINDOW = 2**31  # as `zstd --long=31` writes; each open file takes that much memory
# what a run leaves at the top of its folder that has the form of data
WRITTEN = {*("metrics.jsonl", "predictions.jsonl", "finished.json", "checkpoints", "model")}
# of a file that cannot be read, or whose compression is damaged
READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError)


def find_local_files(path: str, kinds: Sequence[tuple[str, ...]]) -> list[str]:
    """The files of a name, of a folder and all below it, or of a pattern; sorted.

    A file that has several names, by links to it or to its folder, comes once: by its own name.

    Args:
        kinds: how the names of a folder's files end: of the first kind that it has; those of a
            pattern end in any way.
    """
    if os.path.isdir(path):
        found = _of_first_kind(path, [*_walk(path)], kinds)
    elif os.path.exists(path):
        found = [path]
    elif "**" in (parts := path.split("/")):  # glob would follow links that lead back, for ever
        pattern = "/".join(part if part == "**" else part.replace("**", "*") for part in parts)
        folder = re.match("([^*?[]*/)?", path)[0]
        found = [*filter(re.compile(glob_translate(pattern)).match, _walk(folder))]
    else:
        found = glob.glob(path)
    if found != [path]:
        found = _without_runs(path, found, os.path.exists)
    real = functools.cache(os.path.realpath)  # of folders: of each file it would take long

    def own_name(file: str) -> str:
        folder, name = os.path.split(file)
        return real(file) if os.path.islink(file) else os.path.join(real(folder), name)

    found.sort(key=lambda file: (own_name(file) != os.path.abspath(file), file))
    files = {_identity(file, own_name): file for file in reversed(found)}
    if len(files) < len(found):
        again = len(found) - len(files)
        warn_once(f"{path}: {again} more names (links) of the same files are left out")
    return sorted(files.values())


def _of_first_kind(folder: str, files: list[str], kinds: Sequence[tuple[str, ...]]) -> list[str]:
    """Of a folder's files those that are data: notes and tables beside them are none."""
    of_kinds = [[file for file in files if file.endswith(kind)] for kind in kinds]
    first, *rest = [found for found in of_kinds if found] or [[]]
    if rest:
        left_out = os.path.basename(rest[0][0])
        warn_once(
            f"{folder}: {sum(map(len, rest))} files of another kind than "
            f"{os.path.basename(first[0])} are left out, as {left_out}: a pattern names them"
        )
    return first


def _without_runs(path: str, files: list[str], exists: Callable[[str], bool]) -> list[str]:
    """Without what runs have left where data are looked for: metrics are no text to train on.

    Args:
        path: a folder or a pattern, which may stand in a run's folder itself.
    """
    path = os.fspath(path)
    top = re.match("[^*?[]*", path)[0]
    top = (top if top == path else os.path.dirname(top)).rstrip("/")

    @functools.cache
    def is_run(folder: str) -> bool:
        marks = ("metrics.jsonl", "checkpoints")
        has = (exists(os.path.join(folder, name)) for name in ("config.yaml", *marks))
        return next(has) and any(has)

    @functools.cache
    def is_in_run(folder: str) -> bool:
        is_inside = len(folder.rstrip("/")) > len(top)
        return is_inside and (is_run(folder) or is_in_run(os.path.dirname(folder)))

    def is_written(file: str) -> bool:
        first = file[len(top) :].strip("/").partition("/")[0]
        return is_in_run(os.path.dirname(file)) or (first in WRITTEN and is_run(top))

    kept = [file for file in files if not is_written(file)]
    if len(kept) < len(files):
        left_out = len(files) - len(kept)
        warn_once(f"{path}: {left_out} files that runs have written there are left out")
    return kept


def _walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files in it and below, without hidden ones and links to a folder that they stand in."""
    above = (*above, os.path.realpath(folder))
    try:
        names = os.listdir(folder or ".")
    except OSError as error:
        if os.path.isdir(folder):  # a disk's lost+found, say
            warn_once(f"left out {folder}: {error.strerror}")
        names = []
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            is_new = not name.startswith(".") and os.path.realpath(path) not in above
            yield from _walk(path, above) if is_new else ()
        elif not name.startswith("."):
            yield path


def _identity(file: str, own_name: Callable[[str], str]) -> Any:
    """The same for all names of a file."""
    status = os.stat(file) if os.path.exists(file) else None
    # without hard links the numbers of files mean nothing on some file systems
    is_linked = status is not None and status.st_nlink > 1
    return (status.st_dev, status.st_ino) if is_linked else own_name(file)


def find_remote_files(url: str, kinds: Sequence[tuple[str, ...]]) -> list[str]:
    """As `find_local_files`, by whatever file system fsspec has for the URL."""
    first, _, archive = url.partition("::")
    if archive and "://" in first:
        raise InputError(f"{url!r}: files inside of another are not read: unpack {archive}")
    try:
        filesystem, pattern = fsspec.url_to_fs(url)
        if not url.endswith(sum(kinds, ())) and filesystem.isdir(pattern):
            found = _of_first_kind(url, filesystem.find(pattern), kinds)
        else:
            found = filesystem.glob(pattern)
        if found != [pattern]:
            found = _without_runs(pattern, found, filesystem.exists)
    except Exception as error:  # every file system has kinds of its own
        raise InputError(f"source {url!r}: {type(error).__name__}: {error}") from None
    return [filesystem.unstrip_protocol(file) for file in found]


@contextmanager
def open_file(address: str) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, decompressed when its name ends with .gz or .zst.

    A read that fails is tried again from where it stopped.
    """
    with io.BufferedReader(_File(address), BUFFER) as stream:
        if address.endswith(".gz"):
            yield gzip.GzipFile(fileobj=stream)
        elif address.endswith(".zst"):
            yield io.BufferedReader(_ZstdFile(stream), BUFFER)
        else:
            yield stream


class _File(io.RawIOBase):
    def __init__(self, address: str):
        # a local name may hold what fsspec takes for a chain of file systems: a::b.jsonl
        is_local = os.path.exists(address) or "://" not in address
        local = (fsspec.filesystem("file"), address)
        self.filesystem, self.path = local if is_local else fsspec.url_to_fs(address)
        self.address, self.stream, self.place = address, None, 0
        self.size = self._try(lambda stream: stream.seek(0, io.SEEK_END))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def readinto(self, buffer: memoryview) -> int:
        def read_block(stream: Any) -> bytes:
            stream.seek(self.place)
            return stream.read(len(buffer))

        block = self._try(read_block)
        buffer[: len(block)] = block
        self.place += len(block)
        return len(block)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        super().close()

    def _try(self, operation: Callable[[Any], Any]) -> Any:
        for wait in (*RETRY_SECONDS, None):
            try:
                if self.stream is None:
                    self.stream = self.filesystem.open(self.path, "rb", block_size=REMOTE_BLOCK)
                return operation(self.stream)
            except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
                raise OSError(error.strerror or type(error).__name__) from error
            except Exception as error:  # every file system has kinds of its own
                reason = f"{type(error).__name__}: {error}"
                if wait is None:
                    raise OSError(f"{reason} ({1 + len(RETRY_SECONDS)} attempts)") from error
            warn(f"{self.address}: {reason}; again in {wait} s", each_rank=True)
            with suppress(Exception):
                self.stream.close()
            self.stream = None
            time.sleep(wait)


class _ZstdFile(io.RawIOBase):
    """All frames of a compressed stream; as in gzip, one that is cut short is an error."""

    def __init__(self, stream: io.BufferedReader):
        self.stream, self.frame, self.compressed, self.plain = stream, None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.plain:
            self.compressed = self.compressed or self.stream.read(ZSTD_PIECE)
            if not self.compressed:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("the compressed stream ends in the middle of a frame")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
            self.plain = memoryview(self.frame.decompress(self.compressed))
            self.compressed = self.frame.unused_data
        count = min(len(buffer), len(self.plain))
        buffer[:count], self.plain = self.plain[:count], self.plain[count:]
        return count


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder under; renamed to it when all went well.

    A folder that is replaced is kept beside until the new one stands in its place.
    """
    aside, previous = (path.with_name(f".{path.name}.{end}") for end in ("partial", "previous"))
    remove(aside)
    try:
        yield aside
        grant(aside)
        if aside.is_dir() and os.path.lexists(path):
            remove(previous)
            os.replace(path, previous)  # a folder takes no name that is in use
        os.replace(aside, path)
        remove(previous)
    finally:
        if os.path.lexists(previous) and not os.path.lexists(path):
            os.replace(previous, path)
        remove(aside)


def grant(path: Path) -> None:
    """Files that a library has made for its user alone are everybody's whom the umask allows."""
    for file in (path, *path.rglob("*")):
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) == 0o600:
            file.chmod(0o666 & ~UMASK)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(*paths: Path) -> None:
    """Wait until files and folders are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
