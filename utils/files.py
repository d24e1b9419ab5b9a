"""Files anywhere (local, or at a URL that fsspec opens), read in ranges and with patience."""

import gzip
import io
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import zstandard

RETRY_SECONDS = (1, 2, 4, 8, 16)  # waits before a read that failed is tried again
REMOTE_BLOCK = 2**21  # bytes of a range that is fetched
BUFFER = 2**18
# of a file that cannot be read, or whose compression is damaged
READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError)


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
        self.filesystem, self.path = fsspec.url_to_fs(address)
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
            print(
                f"warning: {self.address}: {reason}; again in {wait} s", file=sys.stderr, flush=True
            )
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
            self.compressed = self.compressed or self.stream.read(2**16)
            if not self.compressed:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("the compressed stream ends in the middle of a frame")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
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
    _remove(aside)
    try:
        yield aside
        if aside.is_dir() and os.path.lexists(path):
            _remove(previous)
            os.replace(path, previous)  # a folder takes no name that is in use
        os.replace(aside, path)
        _remove(previous)
    finally:
        if os.path.lexists(previous) and not os.path.lexists(path):
            os.replace(previous, path)
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
