"""Time of a step by phase. Phases exclude one another, and no clock waits for the device while training."""

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
    """Marks moments now and measures the time between them later."""

    @abstractmethod
    def mark(self) -> Mark:
        """Mark this moment."""

    @abstractmethod
    def seconds(self, start: Mark, end: Mark) -> float:
        """Return the seconds from one mark to another."""


class HostClock(AbstractClock[float]):
    """Clock of the host."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class DeviceClock(AbstractClock[torch.cuda.Event]):
    """Clock of the GPU. A mark is the moment when the GPU has finished everything queued before it.

    The host waits only when it reads marks. Read them a step late, and training does not wait.
    """

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Stopwatch:
    """Seconds by phase. While an inner phase runs, the outer one is paused.

    Args:
        clock: clock to read.

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
        """Name of the running phase; None if there is none."""
        return self._stack[-1] if self._stack else None

    def start(self, base: str) -> None:
        """Begin. Time outside of phases counts as `base`."""
        self._stack, self._marks = [], []
        self._enter(base)

    def stop(self) -> list[tuple[Any, str | None]]:
        """End, and return the marks; `read` turns them into seconds later."""
        self._marks.append((self._clock.mark(), None))
        marks, self._stack, self._marks = self._marks, [], []
        return marks

    def read(self, marks: list[tuple[Any, str | None]]) -> dict[str, float]:
        """Return the seconds by phase between the first and the last mark."""
        seconds: dict[str, float] = defaultdict(float)
        for (start, name), (end, _) in pairwise(marks):
            assert name is not None
            seconds[name] += self._clock.seconds(start, end)
        return dict(seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`. Counts nothing before `start` and after `stop`."""
        if not self._stack:
            yield
            return
        self._enter(name)
        try:
            yield
        finally:
            # `stop` may have been called inside, after an error that somebody caught.
            if self._stack:
                self._stack.pop()
                if self._stack:
                    self._marks.append((self._clock.mark(), self._stack[-1]))

    def wrap(self, owner: Any, method: str, *, phase: str) -> None:
        """Count every call of `owner.method` as `phase`, until `unwrap`."""
        setattr(owner, method, self._counted(getattr(owner, method), phase))
        self._wrapped.append((owner, method))

    def unwrap(self) -> None:
        """Restore all wrapped methods."""
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
