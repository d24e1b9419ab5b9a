"""The folder of a data set that a recipe makes: replaced whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.config import InputError
from utils.files import written_aside
from utils.integrity import locked


@contextmanager
def replaced_folder(output_dir: Path, files: set[str], content: str) -> Iterator[Path]:
    """A new folder beside `output_dir` to write in, which takes its place when all went well.

    Args:
        files: paths of all files that will stand in it; a folder that holds others is refused.
        content: what they make up, for messages: "a sample corpus".

    Raises:
        InputError: `output_dir` is a file, holds something else, cannot be written, or another
            process is at it.
    """
    if output_dir.is_file():
        raise InputError(f"{output_dir} is a file: give another folder with --output_dir")
    if not _holds_only(output_dir, files):
        raise InputError(
            f"{output_dir} holds something else than {content}, which would be lost: "
            f"remove it or give another folder with --output_dir"
        )
    target = output_dir.resolve()  # behind a link, what the link points to is replaced
    try:
        with locked(target), written_aside(target) as folder:
            folder.mkdir(parents=True)
            yield folder
    except OSError as error:
        raise InputError(f"cannot build {output_dir}: {error.strerror}: {error.filename}") from None


def _holds_only(folder: Path, files: set[str]) -> bool:
    """Whether a folder is absent or empty, or holds these files and no other."""
    present = set()
    for path in folder.rglob("*"):
        if not path.is_dir():
            present.add(path.relative_to(folder).as_posix())
            if not present <= files:
                return False
    return present in (set(), files)
