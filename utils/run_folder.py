"""The folder of a run: settings, metrics, checkpoints, export, card and plots.

config.yaml  metrics.jsonl  checkpoints/  model/  README.md  plots/  finished.json
and, as long as a process writes there, .lock
"""

import dataclasses
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars

from utils import checkpoint
from utils.config import InputError, as_yaml, at_end
from utils.files import written_aside
from utils.integrity import Lock, changed_files
from utils.program import announced, launched_rank, say, warn
from utils.progress import command_line
from utils.ranks import launched_world_size

# settings that a finished run has no use for any more; what its data are, they say themselves
FREE = {
    *("output_dir", "resume", "report_to", "logging_steps", "save_steps", "keep_last"),
    *("keep_every", "per_device_batch_size", "per_device_eval_batch_size", "torch_compile"),
    *("gradient_checkpointing", "attn_implementation", "dataloader_num_workers"),
    *("on_bad_record", "verify_sources", "train_sources", "train_data", "transfer_data"),
    *("project", "run_name", "push_to_hub", "hub_model_id", "hub_private_repo", "plan"),
}
# the end of a run is done again for them
MEASURED_AT_THE_END = {
    *("test_sources", "test_data", "baselines", "pseudo_perplexity_documents", "lead_sentences"),
    *("merge_adapter", "license", "language", "tags", "scored_answers"),
}
# of a model that was in the repository before: no other may be loaded in its place
STALE = ("config.json", "adapter_config.json", "adapter_model.safetensors", "model*.safetensors*")
DATA_ONCE = ("sources and files", "lanes", "shuffle_documents", "shuffle_bytes")
# what runs write in their folders
FILES = ("config.yaml", "metrics.jsonl", "finished.json", "README.md", "predictions.jsonl")
FOLDERS = ("checkpoints", "model", "base_model", "student", "plots")
LONGEST = "checkpoints/.step-00000000.partial/rank-00000-of-00001.safetensors"


class RunFolder:
    """`output_dir`, to begin a run in or to continue the one that is there.

    Nothing is written yet but .lock, of the first rank: it is gone when the run ends.

    Raises:
        InputError: not a folder, not writable, in use by another run (of several ranks `check`
            says that), or with checkpoints although `resume` is "never".
    """

    def __init__(self, output_dir: str, resume: Literal["auto", "never"] = "auto"):
        self.path = Path(output_dir)
        self.metrics = self.path / "metrics.jsonl"
        try:
            self._check_writable()
        except OSError as error:
            problem = f"cannot write in {error.filename}: {error.strerror}"
            raise InputError(f"output_dir: {problem}") from None
        self.lock, self.refusal = None, ""
        if launched_rank() == 0:
            try:
                self.lock = Lock(self.path / ".lock", self.path)
                at_end.callback(self.lock.close)
            except InputError as error:
                self.refusal = str(error)
            except OSError as error:
                self.refusal = f"output_dir: cannot write {error.filename}: {error.strerror}"
            if self.refusal and launched_world_size() == 1:
                raise InputError(self.refusal)
        if resume == "never" and self.newest_checkpoint():
            raise InputError(
                f"{self.newest_checkpoint()} exists and resume is 'never': "
                "choose another output_dir, or remove it"
            )

    def _check_writable(self) -> None:
        places = [self.path.absolute(), *self.path.absolute().parents]
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(self.path.absolute() / LONGEST)
        place = next(place for place in places if os.path.lexists(place))
        _check_kind(place, is_folder=True)
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            error.filename = place
            raise
        for name in (*FILES, *FOLDERS):
            path = self.path / name
            if os.path.lexists(path):
                _check_kind(path, is_folder=name in FOLDERS)
                if not os.access(path, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def check(self, ranks: Any = None) -> None:
        """Raises InputError, on all `ranks`, where another run is there or the folder another."""
        problem = self.refusal or (self.lock.problem() if self.lock else "")
        if ranks:
            problem = ranks.gather([problem])[0]
        if problem:
            raise InputError(problem)

    def newest_checkpoint(self) -> Path | None:
        return checkpoint.newest(self.path)

    def is_finished(self, settings: Any, data: Any) -> bool:
        """Whether a run of these settings on these data has come to its end here.

        It has not where limits let it go on, or where more is to be measured of its end. What is
        finished is pushed to the Hub, if it is to be and was not yet.

        Args:
            settings: a `TrainingArguments`.

        Raises:
            InputError: it was another run: this one would train nothing, and say it had.
        """
        try:
            end = json.loads((self.path / "finished.json").read_text())
            (was, data_then), (now, data_now) = end["run"], _identity(settings, data)
        except (OSError, ValueError, KeyError):
            return False
        limits, last = {*settings.limits, "num_train_epochs"}, settings.total_steps
        changed = {name for name in was.keys() & now.keys() if was[name] != now[name]} - FREE
        if changed & limits and (last is None or last > end["step"]):
            return False
        changed -= limits if last == end["step"] else set()
        compared = [name for name in now if name in changed - MEASURED_AT_THE_END]
        then = {name: was[name] for name in compared} | {"the training data": data_then}
        this = {name: now[name] for name in compared} | {"the training data": data_now}
        for found, of_run in ((then, was), (this, now)):
            tables = [*of_run.get("train_data", ()), *of_run.get("transfer_data", ())]
            weights = [table.get("weight", 1.0) for table in tables]
            found["the weights of the tables"] = weights if {*weights} != {1.0} else []
        for name, before, after in differences(then, this):
            raise InputError(
                f"{self.path} is finished with {name} {before}, this is {after}: "
                "choose another output_dir, or change it back"
            )
        if changed:
            return False
        say(f"{self.path} is finished at step {end['step']}: {end['reason']}")
        if launched_rank() == 0:
            self.push(settings)
        return True

    def begin(self, settings: Any, metrics_size: int) -> None:
        """Write the settings, and cut the metrics back to what the checkpoint has seen of them."""
        self.check()
        with written_aside(self.path / "config.yaml") as file:
            file.write_text(as_yaml(settings))
        (self.path / "finished.json").unlink(missing_ok=True)
        with self.metrics.open("ab") as file:
            file.truncate(min(metrics_size, file.tell()))
        for partial in self.path.glob("checkpoints/.*.partial"):
            shutil.rmtree(partial, ignore_errors=True)

    def record(self, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; what is not finite is null there, as JSON has it."""
        self.check()
        line = json.dumps({name: _finite(value) for name, value in values.items()})
        try:
            with self.metrics.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.metrics}: {error.strerror}") from None

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl."""
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that a kill cut short is left out."""
        records = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def finish(self, step: int, reason: str, settings: Any, data: Any) -> None:
        end = {"step": step, "reason": reason, "run": _identity(settings, data)}
        with written_aside(self.path / "finished.json") as file:
            file.write_text(json.dumps(end))

    def push(self, settings: Any) -> None:
        """Upload model/, which is finished, with its card and plots, unless that was done."""
        file, name = self.path / "finished.json", settings.hub_name
        end = json.loads(file.read_text())
        if not settings.push_to_hub or end.get("pushed") == name:
            return
        try:
            with announced(f"uploading {self.path / 'model'}"):
                say(f"pushed: {push_to_hub(settings, self.path / 'model')}")
        except InputError as error:
            again = f"{self.path} is finished all the same; to upload it: {command_line()}"
            raise InputError(f"{error}. {again}") from None
        with written_aside(file) as aside:
            aside.write_text(json.dumps(end | {"pushed": name}))


def push_to_hub(settings: Any, folder: Path | None = None) -> str:
    """Make sure of the repository, and upload a folder, if one is given, in one commit.

    Returns:
        The address of the repository.

    Raises:
        InputError: there is no token, or one that may not write there, or no Hub; or what is there
            is public, and was to be private.
    """
    api, name = HfApi(), settings.hub_name
    where = f"push_to_hub: cannot write to {name} at {api.endpoint}"
    if get_token() is None:
        raise InputError(f"{where}: there is no token: set HF_TOKEN, or run hf auth login")
    disable_progress_bars()
    try:
        address = api.create_repo(name, private=settings.hub_private_repo, exist_ok=True)
        if settings.hub_private_repo and not api.repo_info(address.repo_id).private:
            raise InputError(f"hub_private_repo: {address} is there already, and public")
        if folder is None:  # an upload begins with a question that answers those who may write
            api.preupload_lfs_files(address.repo_id, [CommitOperationAdd("README.md", b"")])
        else:
            more = {"commit_message": "Model, card and plots", "delete_patterns": STALE}
            api.upload_folder(repo_id=address.repo_id, folder_path=folder, **more)
    except InputError:
        raise
    except Exception as error:  # of huggingface_hub, httpx and hf_xet
        refusals = {401: "the Hub does not know the token", 403: "the token may not write there"}
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        reason = f"{type(error).__name__}: {shorten(str(error), 300)}"
        raise InputError(f"{where}: {refusals.get(status, reason)}") from None
    return address


def _check_kind(path: Path, is_folder: bool) -> None:
    if not (path.is_dir() if is_folder else path.is_file()):
        kinds = {"a file": path.is_file(), "a folder": path.is_dir(), "no file": path.exists()}
        found = next((kind for kind, is_it in kinds.items() if is_it), "a link to nothing")
        raise InputError(
            f"output_dir: {path} is {found}, not {'a folder' if is_folder else 'a file'}: "
            "move it away, or choose another output_dir"
        )


def check_continues(
    folder: Path, state: dict, fixed: dict, files: dict[str, list[Any]], by_hash: bool
) -> None:
    """Raises InputError where the checkpoint in `folder`, of this state, is of another run.

    Args:
        files: that are trained on, as `describe_files` has them. One that was written again with
            as many bytes may be a copy: it is named on the screen, and by hash refused if it
            is none.
    """
    changes = changed_files(state.get("training_files", {}), files)
    changed = "; ".join(f"{file} {change}" for file, change in [*changes.items()][:3])
    for name, was, now in differences(state["fixed"], fixed):
        why = f" ({changed})" if changed and name.startswith("the training data") else ""
        raise InputError(
            f"cannot continue {folder}: {name} was {was} and is {now}{why}. "
            "Change it back, or choose another output_dir"
        )
    if changed and by_hash:
        raise InputError(
            f"cannot continue {folder}: {changed}. Change it back, or choose another output_dir"
        )
    if changed:
        warn(f"since {folder}: {changed}; verify_sources: hash would refuse other content")


def differences(was: dict, now: dict, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value before, value now) of what differs in nested settings."""
    for key in {**was, **now}:
        before, after = was.get(key), now.get(key)
        if isinstance(before, list) and isinstance(after, dict):  # as data were described once
            before = after | dict(zip(DATA_ONCE, before, strict=False))
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after


def _identity(settings: Any, data: Any) -> Any:
    """Settings and data as JSON gives them back."""
    return json.loads(json.dumps([dataclasses.asdict(settings), data]))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
