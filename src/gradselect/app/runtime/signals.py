"""SIGTERM and SIGINT to a run: the first asks it to save and to end, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from .processes import has_launcher, is_first

STOPPING = (signal.SIGTERM, signal.SIGINT)
SAME_SECONDS = 1.0
"""A launcher and a scheduler may both tell a process; what comes within this time is one signal."""


class Preempted(SystemExit):
    """A signal has ended a run, and `--resume` goes on with it. Uncaught it ends the process, with `code` and no words.

    Attributes:
        code: 128 + the signal's number: 143 after SIGTERM, 130 after SIGINT.
        message: what has been kept.
    """

    def __init__(self, number: int, *, message: str) -> None:
        super().__init__(128 + number)
        self.message = message


class SignalWatch:
    """Remembers that a signal came.

    Attributes:
        received: its number; 0 while none has come.
    """

    def __init__(self, numbers: Sequence[int] = ()) -> None:
        self.received = 0
        self._numbers = numbers
        self._since = 0.0

    def receive(self, number: int, _: Any = None) -> None:
        """Handle a signal."""
        if not self.received:
            self.received, self._since = number, time.monotonic()
            self._acknowledge(number)
            if not has_launcher():
                # Even where Python would not come to run a handler, the next one ends the process.
                for each in self._numbers:
                    signal.signal(each, signal.SIG_DFL)
        elif time.monotonic() - self._since > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _acknowledge(self, number: int) -> None:
        text = f"\n{signal.Signals(number).name}: ends after this step with a checkpoint; once more: at once\n"
        if is_first():
            # Streams of Python may be in the middle of a line; what is shown must not decide whether a run is saved.
            with suppress(OSError):
                os.write(2, text.encode())


@contextmanager
def watched_signals() -> Iterator[SignalWatch]:
    """Signals inside are remembered and do nothing else; in a thread, which Python tells of none, nothing is watched.

    One that the process was told to ignore, as `nohup` and `&` do, is ignored still.
    """
    if threading.current_thread() is not threading.main_thread():
        yield SignalWatch()
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    watched = [number for number in STOPPING if before[number] != signal.SIG_IGN]
    watch = SignalWatch(watched)
    try:
        for number in watched:
            signal.signal(number, watch.receive)
        yield watch
    finally:
        for number in watched:
            # None: a handler that was not set from Python, and which Python cannot set again.
            signal.signal(number, signal.SIG_DFL if before[number] is None else before[number])
