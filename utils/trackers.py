"""The services that a run tells its numbers to (`report_to`); none of them ends it."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from utils.config import InputError
from utils.usage import spared

if TYPE_CHECKING:
    import accelerate

# as Accelerate calls them, each like its package
TRACKERS = "aim, clearml, comet_ml, dvclive, mlflow, swanlab, tensorboard, trackio, wandb"


def trackers(report_to: list[str] | str) -> list[str]:
    """The names that are meant: `all` are those that are installed, `none` is none.

    Raises:
        InputError: no tracker of this name, or not installed.
    """
    known, names = TRACKERS.split(", "), [report_to] if isinstance(report_to, str) else report_to
    if "all" in names:
        return [name for name in known if is_installed(name)]
    names = [name for name in dict.fromkeys(names) if name != "none"]
    for name in names:
        if name not in known:
            raise InputError(f"report_to: no tracker {name!r}: give all, none, or of {TRACKERS}")
        if not is_installed(name):
            raise InputError(
                f"report_to: {name} is not installed: pip install {name.replace('_', '-')}, "
                "or leave it out"
            )
    return names


def start_trackers(accelerator: "accelerate.Accelerator", step: int) -> None:
    """Raises InputError when one does not let itself be started."""
    try:
        accelerator.init_trackers("", init_kwargs={"tensorboard": {"purge_step": step}})
    except Exception as error:  # each has kinds of its own
        raise InputError(f"report_to: {type(error).__name__}: {error}") from None


def track(accelerator: "accelerate.Accelerator", record: dict[str, Any]) -> None:
    """The numbers of a record; a tracker that fails is left out from there on."""
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
    for tracker in list(accelerator.trackers):
        accelerator.trackers.remove(tracker)
        with spared(f"report_to: {tracker.name} is left out from here on"):
            tracker.log(numbers, step=record["step"])
            accelerator.trackers.append(tracker)


def end_trackers(accelerator: "accelerate.Accelerator") -> None:
    while accelerator.trackers:
        tracker = accelerator.trackers.pop(0)
        with spared(f"report_to: {tracker.name}"):
            tracker.finish()


def is_installed(name: str) -> bool:
    found = find_spec(name)
    return found is not None and found.origin is not None  # a mere folder wandb/ is no package
