"""SIGTERM and SIGINT to a run: after the first it saves a checkpoint and ends, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from .processes import has_launcher, is_rank_0

STOPPING = (signal.SIGTERM, signal.SIGINT)
SAME_SECONDS = 1.0
"""A launcher and a scheduler may both signal a process; two signals within this time count as one."""


class Preempted(SystemExit):
    """A signal has ended a run, which `--resume` continues. Uncaught it ends the process with `code`, silently.

    Attributes:
        code: 128 + the signal's number: 143 after SIGTERM, 130 after SIGINT.
        message: which checkpoint there is.
    """

    def __init__(self, number: int, *, message: str) -> None:
        super().__init__(128 + number)
        self.message = message


class SignalWatch:
    """Remembers that a signal came.

    Attributes:
        received: number of the first signal; 0 while none has come.
        numbers: signals that are sent here.
    """

    def __init__(self) -> None:
        self.received = 0
        self.numbers: Sequence[int] = ()
        self._since = 0.0

    def receive(self, number: int, _: Any = None) -> None:
        """Handle a signal."""
        if not self.received:
            self.received, self._since = number, time.monotonic()
            self._acknowledge(number)
            if not has_launcher():
                # The next one ends the process even where Python runs no handler, as inside a long C call.
                for each in self.numbers:
                    signal.signal(each, signal.SIG_DFL)
        elif time.monotonic() - self._since > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _acknowledge(self, number: int) -> None:
        text = f"\n{signal.Signals(number).name}: ends after this step with a checkpoint; once more: at once\n"
        if is_rank_0():
            # Not `print`: a handler may interrupt one. An error here must not keep the run from being saved.
            with suppress(OSError):
                os.write(2, text.encode())


@contextmanager
def watched_signals() -> Iterator[SignalWatch]:
    """Remember signals instead of acting on them, as `handled_signals` does."""
    watch = SignalWatch()
    with handled_signals(watch.receive, STOPPING) as watch.numbers:
        yield watch


@contextmanager
def handled_signals(handler: Callable[[int, Any], None], numbers: Iterable[int]) -> Iterator[Sequence[int]]:
    """Send signals to `handler` inside the block. Yields those that are.

    A signal that is ignored, as `nohup` and `&` set it, stays ignored. Python sets handlers in the main thread only:
    in another thread none is sent.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if is_main}
    handled = [number for number in before if before[number] != signal.SIG_IGN]
    try:
        for number in handled:
            signal.signal(number, handler)
        yield handled
    finally:
        for number in handled:
            # None: the handler was not set from Python, which cannot set it again.
            signal.signal(number, signal.SIG_DFL if before[number] is None else before[number])
