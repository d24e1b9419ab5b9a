"""A recipe as a program: what it hears, and what it gives back when it ends."""

import multiprocessing.util
import os
import select
import signal
import threading
import time
import typing
from contextlib import ContextDecorator, ExitStack, suppress
from typing import Any

from utils.usage import launched_rank, say

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ONE_WISH = 0.5  # seconds: `timeout -s INT` sends two signals, and means one


class _AtEnd(ExitStack, ContextDecorator):
    """What is given back when the decorated `main` ends, however it does."""

    is_program = False  # whether the process ends then


at_end = _AtEnd()


def leave(status: int) -> typing.NoReturn:
    """End this process and its data workers at once, whatever they wait for."""
    for worker in multiprocessing.active_children():
        worker.kill()
    multiprocessing.util._run_finalizers(0)  # else it is said of their semaphores that they leak
    os._exit(status)


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
