"""What the screen and the trackers show of a run: bars, speed, utilization, time left."""

import dataclasses
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil
import torch
from tqdm import tqdm

from utils.config import InputError
from utils.program import PATIENCE, launched_rank, say, spared
from utils.ranks import flat
from utils.run_state import RunState

if TYPE_CHECKING:
    import accelerate

# dense bf16 FLOP/s of accelerators, by what their name contains (the vendors' data sheets); of
# those whose names begin alike the longer come first
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12}
PEAK_FLOPS |= {"H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
LINE = 120  # characters of an evaluation
TOKENIZER_BATCH = 256  # texts at a time: a bar moves, and what the tokenizer makes of them is large
# what trackers call the name of a run; Accelerate gives them that of the project
RUN_NAMES = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "clearml": "task_name"}
RUN_NAMES |= {"swanlab": "experiment_name", "dvclive": "exp_name"}
tqdm.monitor_interval = 0  # no thread for bars


def told(record: dict[str, Any], metric: str) -> str:
    """An evaluation in a line: the loss, the metric, what else it has room for; or samples."""
    if "eval_loss" in record:
        line = f"step {record['step']}"
        for name in dict.fromkeys(["eval_loss", metric, *record]):
            part = f"  {name} {record[name]:.4f}" if isinstance(record.get(name), float) else ""
            line += part if len(line + part) <= LINE else ""
        return line
    lines = []
    for sample in record.get("samples", ()):
        prompt, text = sample["prompt"], sample["text"]
        end = prompt if len(prompt) <= 2 * LINE else f"…{prompt[-2 * LINE :]}"
        lines.append(f"sample: {end}{text}")
    return "\n".join(lines)


def progress_bar(total: int, what: str, unit: str) -> tqdm:
    """Of the first rank: on a terminal, and gone when it is closed; elsewhere a line now and then.

    Nothing where all is done in a moment.
    """
    shown: dict[str, Any] = {"delay": 1}
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt}{unit}, {remaining} left\n"
        shown = {"delay": PATIENCE, "mininterval": PATIENCE, "bar_format": line}
    is_hidden = launched_rank() > 0
    return tqdm(total=total, desc=what, unit=f" {unit}", leave=False, disable=is_hidden, **shown)


def in_batches(items: Sequence[Any], unit: str) -> Iterator[tuple[int, Sequence[Any]]]:
    """What is to be tokenized, behind a progress bar: (index of the first item, the items)."""
    with progress_bar(len(items), "tokenizing", unit) as bar:
        for start in range(0, len(items), TOKENIZER_BATCH):
            batch = items[start : start + TOKENIZER_BATCH]
            yield start, batch
            bar.update(len(batch))


class Progress:
    """What is shown of one session, from a start or a resume on: by the screen and the trackers.

    Args:
        arguments: a `TrainingArguments`.
        state: where the run stands; it does not begin at 0 on a resume.
        flops_per_token: of the step with this number, 6 N + 12 L A S; 0 when it is not known.

    Raises:
        InputError: a tracker does not let itself be started.
    """

    def __init__(
        self,
        accelerator: "accelerate.Accelerator",
        arguments: Any,
        state: RunState,
        flops_per_token: Callable[[int], float],
    ):
        self.total_steps, self.first_step = state.total_steps, state.step
        self.tokens, self.seconds = state.tokens, state.seconds
        self.start = time.monotonic()
        self.flops_per_token, self.peak_flops = flops_per_token, _peak_flops(accelerator)
        say(arguments.learning_rate_note())
        self.trackers: list[Any] = []
        try:
            for name in arguments.trackers if accelerator.is_main_process else ():
                self.trackers.append(_start_tracker(name, arguments, state.step))
        except Exception as error:  # each has kinds of its own
            raise InputError(f"report_to: {type(error).__name__}: {error}") from None

    def show(self, record: dict[str, Any], seconds: float, metric: str) -> None:
        """A record of metrics.jsonl; adds `tokens_per_second` and `mfu` to that of a step."""
        say(self._line(record, seconds) if "loss" in record else told(record, metric))
        numbers = dict(_tracked(record))
        for tracker in list(self.trackers):
            self.trackers.remove(tracker)
            with spared(f"report_to: {tracker.name} is left out from here on"):
                tracker.log(numbers, step=record["step"])
                self.trackers.append(tracker)

    def end(self) -> None:
        """Of the trackers."""
        while self.trackers:
            tracker = self.trackers.pop(0)
            with spared(f"report_to: {tracker.name}"):
                tracker.finish()

    def _line(self, record: dict[str, Any], seconds: float) -> str:
        step = record["step"]
        rate = (record["tokens"] - self.tokens) / max(seconds - self.seconds, 1e-9)
        self.tokens, self.seconds = record["tokens"], seconds
        record["tokens_per_second"] = round(rate, 1)
        parts = [
            f"step {step}" + (f"/{self.total_steps}" if self.total_steps else ""),
            f"loss {record['loss']:.4f}",
            f"lr {record['learning_rate']:.2e}",
            f"{rate:,.0f} tokens/s",
        ]
        flops = self.flops_per_token(step)
        if self.peak_flops and flops:
            record["mfu"] = round(rate * flops / self.peak_flops, 4)
            parts.append(f"MFU {record['mfu']:.1%} (6 N + 12 L A S, of dense bf16)")
        if self.total_steps:
            a_step = (time.monotonic() - self.start) / (step - self.first_step)
            left = timedelta(seconds=int(a_step * (self.total_steps - step)))
            parts.append(f"{left} left")
        return "  ".join(parts)


def _start_tracker(name: str, arguments: Any, step: int) -> Any:
    """With the settings as hyperparameters; TensorBoard names a run by its folder."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    a, run_name = arguments, arguments.run_name or arguments.output_dir
    options = {"tensorboard": {"purge_step": step}, "aim": {"experiment": a.project}}
    kind, more = LOGGER_TYPE_TO_CLASS[name], options.get(name, {})
    if kind.requires_logging_directory:
        tracker = kind("" if name == "tensorboard" else run_name, a.output_dir, **more)
    else:
        tracker = kind(a.project, **({RUN_NAMES[name]: run_name} if name in RUN_NAMES else {}))
    tracker.start()
    if name == "comet_ml":
        tracker.writer.set_name(run_name)
    values = {
        key: value if isinstance(value, int | float | str) else json.dumps(value)
        for key, value in flat(dataclasses.asdict(a))
    }
    if name == "tensorboard":  # Accelerate's tracker would make a run of its own of them
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(values, dict.fromkeys(("train/loss", "eval/loss"))):
            tracker.writer.file_writer.add_summary(summary)
    else:
        tracker.store_init_configuration(values)
    return tracker


def _tracked(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record as trackers group them: train/loss, eval/loss, eval/loss/code."""
    for key, value in record.items():
        found = re.fullmatch(r"(eval|test)_(.+?)(?:_by_domain)?", key)
        name = "/".join(found.groups()) if found else f"train/{key}"
        values = value if type(value) is dict else {None: value}
        for domain, number in values.items():
            if isinstance(number, int | float) and key != "step":
                tag = name if domain is None else f"{name}/{domain}"
                yield re.sub(r"[^-/.\w]", "_", tag), number


def seconds_since_command() -> float:
    return time.time() - _starting_process().create_time()


def command_line() -> str:
    """The line that started this run, to be run again."""
    words = _starting_process().cmdline()
    # `accelerate` is a script, which its interpreter was given
    return shlex.join(words[1:] if os.path.basename(words[1]) == "accelerate" else words)


def _starting_process() -> psutil.Process:
    """The launcher, where there is one, or this process."""
    process = psutil.Process()
    return (process.parent() or process) if "RANK" in os.environ else process


def _peak_flops(accelerator: "accelerate.Accelerator") -> float | None:
    """Of all ranks together; None where the GPU is not known."""
    if accelerator.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(accelerator.device))
    return peak and peak * accelerator.num_processes


def peak_flops(name: str) -> float | None:
    """Of a GPU by its name; None where it is not known."""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
