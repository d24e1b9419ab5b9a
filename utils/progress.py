"""What the screen and the trackers show of a run: bars, speed, utilization, time left."""

import os
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
from utils.run_state import RunState

if TYPE_CHECKING:
    import accelerate

# dense bf16 FLOP/s of accelerators, by what their name contains (the vendors' data sheets)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
LINE = 120  # characters of an evaluation
TOKENIZER_BATCH = 256  # texts at a time: a bar moves, and what the tokenizer makes of them is large
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
        state: where the run stands; it does not begin at 0 on a resume.
        flops_per_token: of the step with this number, 6 N + 12 L H S; 0 when it is not known.

    Raises:
        InputError: a tracker does not let itself be started.
    """

    def __init__(
        self,
        accelerator: "accelerate.Accelerator",
        state: RunState,
        flops_per_token: Callable[[int], float],
    ):
        self.accelerator = accelerator
        self.total_steps, self.first_step = state.total_steps, state.step
        self.tokens, self.seconds = state.tokens, state.seconds
        self.start = time.monotonic()
        self.flops_per_token, self.peak_flops = flops_per_token, _peak_flops(accelerator)
        try:
            accelerator.init_trackers("", init_kwargs={"tensorboard": {"purge_step": state.step}})
        except Exception as error:  # each has kinds of its own
            raise InputError(f"report_to: {type(error).__name__}: {error}") from None

    def show(self, record: dict[str, Any], seconds: float, metric: str) -> None:
        """A record of metrics.jsonl; adds `tokens_per_second` and `mfu` to that of a step."""
        say(self._line(record, seconds) if "loss" in record else told(record, metric))
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        trackers = self.accelerator.trackers
        for tracker in list(trackers):
            trackers.remove(tracker)
            with spared(f"report_to: {tracker.name} is left out from here on"):
                tracker.log(numbers, step=record["step"])
                trackers.append(tracker)

    def end(self) -> None:
        """Of the trackers."""
        while self.accelerator.trackers:
            tracker = self.accelerator.trackers.pop(0)
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
            parts.append(f"MFU {record['mfu']:.1%} of dense bf16")
        if self.total_steps:
            a_step = (time.monotonic() - self.start) / (step - self.first_step)
            left = timedelta(seconds=int(a_step * (self.total_steps - step)))
            parts.append(f"{left} left")
        return "  ".join(parts)


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
    name = torch.cuda.get_device_name(accelerator.device)
    ranks = accelerator.num_processes
    return next((peak * ranks for key, peak in PEAK_FLOPS.items() if key in name), None)
