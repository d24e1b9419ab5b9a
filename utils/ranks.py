"""What the launcher made of a process, and what the processes of a run agree on."""

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def launched_rank() -> int:
    """Of this process among those that the launcher has started; before they have joined."""
    return int(os.environ.get("RANK", 0))


def launched_world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


class Ranks:
    """This process among the others, listening to the signals that ask a run to stop.

    `stopped` is the same on every rank: set by `sum` and `any_rank` once one of them was told to.
    """

    def __init__(self):
        self.rank, self.world_size = launched_rank(), 1
        self.is_main = self.rank == 0
        self.stop_signal, self.signal_time = 0, 0.0
        self.stopped = False
        self.group = None
        self.handlers = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def join(self, rank: int, world_size: int) -> None:
        """After the process group has formed."""
        self.rank, self.world_size = rank, world_size
        # over the CPU: from step to step the accelerator does not wait
        self.group = dist.new_group(backend="gloo") if world_size > 1 else None

    def release(self) -> None:
        """Give the signals back to whom they were taken from."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def sum(self, values: list[float]) -> list[float]:
        """Over all ranks, in float64; sets `stopped` when any was told to stop."""
        total = torch.tensor([float(self.stop_signal > 0), *values], dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        stop, *sums = total.tolist()
        self.stopped = stop > 0
        return sums

    def any_rank(self, condition: bool) -> bool:
        """Whether it holds on any rank; sets `stopped` when any was told to stop."""
        return self.sum([float(condition)])[0] > 0

    def gather(self, mine: list) -> list:
        """The ranks' lists, one after the other, on every rank."""
        everyone: list[list] = [mine]
        if self.group is not None:
            everyone = [[]] * self.world_size
            dist.all_gather_object(everyone, mine, group=self.group)
        return [item for part in everyone for item in part]

    def _note(self, number: int, frame: Any) -> None:
        # a launcher repeats the terminal's Ctrl-C to its workers: only a later one is a second
        if number == signal.SIGINT and self.stop_signal and time.monotonic() > self.signal_time + 2:
            raise KeyboardInterrupt
        self.stop_signal, self.signal_time = number, time.monotonic()
        # not print: the signal may have come in the middle of one
        if self.is_main:
            name = signal.Signals(number).name
            os.write(1, f"{name}: stopping after this step, with a checkpoint\n".encode())
