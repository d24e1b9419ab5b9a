"""What a launch asks for, taken or refused by name; what a run's processes hear and agree on."""

import json
import math
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from utils.config import InputError
from utils.program import at_end, launched_rank, leave, looked_for, say

DEEPSPEED_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
BATCH_PARTS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# what DeepSpeed calls them (its Adam is AdamW unless adam_w_mode is false), and the settings
AS_HERE = {
    "Adam": "AdamW",
    "WarmupLR": "constant_with_warmup",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
# sections that change what a step is
OTHERS = ("optimizer", "scheduler", "amp", "elasticity", "curriculum_learning", "data_efficiency")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ONE_WISH = 0.5  # seconds: `timeout -s INT` sends two signals, and means one


def launched_world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def launched_with(what: str) -> bool:
    """Whether the launch config asks for DEEPSPEED, FSDP, …"""
    return os.environ.get(f"ACCELERATE_USE_{what}", "").lower() == "true"


def launched_zero_stage() -> int:
    """The ZeRO stage that the launch config asks for; 0: none."""
    if not launched_with("DEEPSPEED"):
        return 0
    if config := _deepspeed_config():
        return config["zero_optimization"]["stage"]
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 0))


def check_launch(arguments: Any) -> None:
    """Raises InputError where the launch asks for another run than the settings do.

    A DeepSpeed JSON that was written for another trainer may name settings, if it names the same.

    Args:
        arguments: a `TrainingArguments`.
    """
    for what in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if launched_with(what):
            raise InputError(f"ACCELERATE_USE_{what}: launch with DDP, DeepSpeed ZeRO or FSDP2")
    if launched_with("FSDP") and os.environ.get("FSDP_VERSION") != "2":
        raise InputError("FSDP: give fsdp_version: 2 in the launch config, as fsdp2.yaml does")
    a, config = arguments, _deepspeed_config()
    found = dict(flat(config))
    same = {
        "train_batch_size": a.global_batch_size,
        "gradient_clipping": a.max_grad_norm,
        "bf16.enabled": a.mixed_precision == "bf16",
        "fp16.enabled": a.mixed_precision == "fp16",
        "optimizer.type": "AdamW",
        "optimizer.params.lr": a.learning_rate,
        "optimizer.params.betas": [a.adam_beta1, a.adam_beta2],
        "optimizer.params.eps": a.adam_epsilon,
        "optimizer.params.weight_decay": a.weight_decay,
        "optimizer.params.adam_w_mode": True,
        "optimizer.params.torch_adam": True,
        "scheduler.type": a.lr_scheduler_type,
    }
    for name in {"optimizer.type", "scheduler.type"} & found.keys():
        found[name] = AS_HERE.get(found[name], found[name])
    parts = [found.get(name) for name in BATCH_PARTS]
    if found.get("train_batch_size", "auto") == "auto" and {*map(type, parts)} == {int}:
        found["train_batch_size"] = launched_world_size() * math.prod(parts)
    used = {name for name in OTHERS if found.get(f"{name}.enabled", True)}
    for name, value in found.items():
        is_named = name in same or name.partition(".")[0] in used
        if is_named and value not in ("auto", same.get(name)):
            raise InputError(
                f"DeepSpeed config {os.environ[DEEPSPEED_FILE]}: {name} is {value}, and for the "
                f'recipe {same.get(name, "unknown")}: set it to "auto", or leave it out'
            )


def _deepspeed_config() -> dict[str, Any]:
    """The JSON that the launch config names; empty where there is none."""
    file = os.environ.get(DEEPSPEED_FILE, "none")
    if file == "none" or not launched_with("DEEPSPEED"):
        return {}
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        stage = config["zero_optimization"]["stage"]
    except OSError as error:
        raise InputError(f"DeepSpeed config {file}: {error.strerror}{looked_for(file)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"DeepSpeed config {file} is not JSON: {error}") from None
    except (TypeError, KeyError):
        stage = None
    if stage not in (1, 2, 3):
        raise InputError(
            f"DeepSpeed config {file}: zero_optimization.stage must be 1, 2 or 3, not {stage}; "
            "without ZeRO launch with multi_gpu.yaml or multi_cpu.yaml"
        )
    return config


def flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested settings."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class StopSignals:
    """What asks a run to stop, until `main` ends or `close` is called; none in a thread of its own.

    A signal is answered at once, whatever the main thread waits for. A SIGINT after another ends
    the process, with status 130; so does a SIGTERM after it from torchelastic, which makes that of
    a second Ctrl-C. Where `main` is a part of another program, it raises KeyboardInterrupt.

    `first` is the number of the first one, or 0; `answer` says what the run does about it.
    """

    def __init__(self):
        self.first, self.time = 0, 0.0
        self.answer = "stopping after this step, with a checkpoint"
        taken = at_end.enter_context(ExitStack())
        self.close, is_program = taken.close, at_end.is_program
        if threading.current_thread() is not threading.main_thread():
            return
        if is_program:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            thread = threading.Thread(target=self._watch, args=[reader], daemon=True)
            thread.start()
            taken.callback(thread.join)
            taken.callback(os.close, writer)
            taken.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer))
        for number in STOP_SIGNALS:
            handler = signal.getsignal(number)
            if handler is None or (number == signal.SIGHUP and handler == signal.SIG_IGN):
                continue  # it is not Python's, and could not be given back; nohup
            signal.signal(number, self._keep if is_program else self._note)
            taken.callback(signal.signal, number, handler)

    def conclude(self, what: str) -> None:
        """Say what the run does at its end, where it ends by itself, whatever it is told."""
        self.answer = f"{what}, then the run ends"
        say(what)

    def _keep(self, number: int, frame: Any) -> None:
        self.first = self.first or number

    def _watch(self, reader: int) -> None:
        """Note what a handler would note when the main thread runs Python again."""
        with open(reader, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] in STOP_SIGNALS:
                    self._note(number[0])

    def _note(self, number: int, frame: Any = None) -> None:
        name = signal.Signals(number).name
        if not self.time:
            self.first, self.time = number, time.monotonic()
            again = "a second Ctrl-C" if number == signal.SIGINT else "Ctrl-C"
            return _say_at_once(f"{name}: {self.answer}; {again} ends at once")
        is_of_elastic = "TORCHELASTIC_RUN_ID" in os.environ and self.first == signal.SIGINT
        is_wish = number == signal.SIGINT or (number == signal.SIGTERM and is_of_elastic)
        if is_wish and time.monotonic() > self.time + ONE_WISH:
            if not at_end.is_program:
                raise KeyboardInterrupt
            first = signal.Signals(self.first).name
            _say_at_once(f"{first}, then {name}: ended at once; the last checkpoint stands")
            leave(130)


def _say_at_once(text: str) -> None:
    """Where a `print` may be under way, or would wait."""
    with suppress(OSError):
        if launched_rank() == 0 and select.select([], [1], [], 0)[1]:
            os.write(1, f"{text}\n".encode())


class Ranks:
    """This process among the others, listening to the signals that ask a run to stop.

    `stopped` is the same on every rank: set by `sum` and `any_rank` once one of them was told to.
    """

    def __init__(self):
        self.rank, self.world_size = launched_rank(), 1
        self.is_main = self.rank == 0
        self.signals = StopSignals()
        self.stopped = False
        self.group = None

    def join(self, rank: int, world_size: int) -> None:
        """After the process group has formed."""
        self.rank, self.world_size = rank, world_size
        # over the CPU: from step to step the accelerator does not wait
        self.group = dist.new_group(backend="gloo") if world_size > 1 else None

    def sum(self, values: list[float]) -> list[float]:
        """Over all ranks, in float64; sets `stopped` when any was told to stop."""
        total = torch.tensor([float(self.signals.first > 0), *values], dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        stop, *sums = total.tolist()
        self.stopped = stop > 0
        return sums

    def any_rank(self, condition: bool) -> bool:
        """Whether it holds on any rank; sets `stopped` when any was told to stop."""
        return self.sum([float(condition)])[0] > 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what one rank does alone: where that fails all end, and that one says why."""
        failure = None
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # what Rust raises is no Exception
            failure, is_rust = error, "(os error " in str(error)
            if isinstance(error, OSError) and error.filename:
                failure = InputError(f"cannot read or write {error.filename}: {error.strerror}")
            elif isinstance(error, OSError) or (is_rust and not isinstance(error, InputError)):
                failure = InputError(f"cannot read or write: {error}")
        if self.any_rank(failure is not None):
            end_together(failure)

    def gather(self, mine: list) -> list:
        """The ranks' lists, one after the other, on every rank."""
        everyone: list[list] = [mine]
        if self.group is not None:
            everyone = [[]] * self.world_size
            dist.all_gather_object(everyone, mine, group=self.group)
        return [item for part in everyone for item in part]


def end_together(failure: BaseException | None) -> NoReturn:
    """Of all ranks, when one of them has met a failure: that one says so."""
    if isinstance(failure, InputError):
        failure.one_rank = True
    raise failure or SystemExit(2)
