"""Where the time of a step goes: phases that exclude one another, read from a clock that never waits for the device."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch

Mark = TypeVar("Mark")


class AbstractClock(ABC, Generic[Mark]):
    """Makes marks now, and tells later how far apart they are."""

    @abstractmethod
    def mark(self) -> Mark:
        """This moment."""

    @abstractmethod
    def seconds(self, start: Mark, end: Mark) -> float:
        """From one mark to another."""


class HostClock(AbstractClock[float]):
    """The processor's clock."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class DeviceClock(AbstractClock[torch.cuda.Event]):
    """The GPU's own clock: a mark is when the GPU has done all that it was given before.

    The host waits only when marks are read, so that whoever reads them later does not hold up training.
    """

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Stopwatch:
    """Seconds by phase; while an inner phase runs, the one around it stands still.

    Args:
        clock: what to read.

    Example:
        >>> watch = Stopwatch(HostClock())
        >>> watch.start("optimizer")
        >>> with watch.phase("selection"):
        ...     pass
        >>> sorted(watch.read(watch.stop()))
        ['optimizer', 'selection']
    """

    def __init__(self, clock: AbstractClock[Any]) -> None:
        self._clock = clock
        self._stack: list[str] = []
        self._marks: list[tuple[Any, str | None]] = []
        self._wrapped: list[tuple[Any, str]] = []

    @property
    def current(self) -> str | None:
        """The phase that counts now."""
        return self._stack[-1] if self._stack else None

    def start(self, base: str) -> None:
        """Begin; what no phase claims is counted as `base`."""
        self._stack, self._marks = [], []
        self._enter(base)

    def stop(self) -> list[tuple[Any, str | None]]:
        """End, and return the marks, which `read` turns into seconds whenever that is convenient."""
        self._marks.append((self._clock.mark(), None))
        marks, self._stack, self._marks = self._marks, [], []
        return marks

    def read(self, marks: list[tuple[Any, str | None]]) -> dict[str, float]:
        """Seconds by phase between the first and the last of the marks."""
        seconds: dict[str, float] = defaultdict(float)
        for (start, name), (end, _) in pairwise(marks):
            assert name is not None
            seconds[name] += self._clock.seconds(start, end)
        return dict(seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside as `name`; outside of `start` and `stop`, nothing is counted."""
        if not self._stack:
            yield
            return
        self._enter(name)
        try:
            yield
        finally:
            # `stop` may have come in between, after an error that somebody caught.
            if self._stack:
                self._stack.pop()
                if self._stack:
                    self._marks.append((self._clock.mark(), self._stack[-1]))

    def wrap(self, owner: Any, method: str, *, phase: str) -> None:
        """Count every call of `owner.method` as `phase`, until `unwrap`."""
        setattr(owner, method, self._counted(getattr(owner, method), phase))
        self._wrapped.append((owner, method))

    def unwrap(self) -> None:
        """Leave everything as it was."""
        while self._wrapped:
            owner, method = self._wrapped.pop()
            delattr(owner, method)

    def _enter(self, name: str) -> None:
        self._stack.append(name)
        self._marks.append((self._clock.mark(), name))

    def _counted(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            with self.phase(phase):
                return function(*arguments, **options)

        return counted
