"""Time left of a training, from the steps, evaluations and checkpoints so far."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from gradselect.app.progress import clock

NUM_STEPS = 50
"""Steps that the time of a step is averaged over."""

Pause = Literal["evaluation", "checkpoint"]
"""What a run does between two steps; a checkpoint beside an evaluation counts with it."""


@dataclass(frozen=True, kw_only=True)
class Calendar:
    """Steps at which a run does something else than train.

    Args:
        last_step: number of the last step.
        evaluate_every: steps between two evaluations; None: no evaluations during training.
        evaluates_last: an evaluation follows the last step.
        save_every: steps between two checkpoints; None: no checkpoints.
    """

    last_step: int
    evaluate_every: int | None = None
    evaluates_last: bool = False
    save_every: int | None = None

    def evaluations_after(self, step: int) -> int:
        """Return the number of evaluations that follow step `step`, its own not counted."""
        regular = _between(step, self.last_step, self.evaluate_every)
        is_extra = self.evaluates_last and (self.evaluate_every is None or self.last_step % self.evaluate_every != 0)
        return regular + is_extra

    def checkpoints_after(self, step: int) -> int:
        """Return the number of checkpoints that follow step `step`, its own not counted."""
        return _between(step, self.last_step, self.save_every)


def _between(step: int, last_step: int, every: int | None) -> int:
    return 0 if every is None else last_step // every - step // every


class TimeLeft:
    """Estimates the time left. Evaluations and checkpoints count by themselves, so steps do not seem slower after them.

    Args:
        calendar: what the run does at which step.
        seconds: returns the time in seconds.
    """

    def __init__(self, calendar: Calendar, *, seconds: Callable[[], float] = time.monotonic) -> None:
        self._calendar = calendar
        self._seconds = seconds
        self._steps: deque[float] = deque(maxlen=NUM_STEPS)
        self._pauses: dict[Pause, list[float]] = {"evaluation": [], "checkpoint": []}
        self._pause: tuple[Pause, float] | None = None
        self._begun = seconds()

    def begin_step(self) -> None:
        """Note that a step begins, and that what came between it and the one before is over."""
        self._begun = self._seconds()
        if self._pause is not None:
            kind, since = self._pause
            self._pauses[kind].append(self._begun - since)

    def end_step(self, *, before: Pause | None = None) -> None:
        """Note that a step ends, and what comes before the next one."""
        now = self._seconds()
        self._steps.append(now - self._begun)
        self._pause = None if before is None else (before, now)

    def text_after(self, step: int) -> str:
        """Return e.g. "about 4:35 left"; evaluations that none has been measured of are named beside it."""
        if not self._steps:
            return ""
        seconds = fmean(self._steps) * (self._calendar.last_step - step)
        evaluations = self._calendar.evaluations_after(step)
        counts: dict[Pause, int] = {"evaluation": evaluations, "checkpoint": self._calendar.checkpoints_after(step)}
        seconds += sum(fmean(self._pauses[kind]) * count for kind, count in counts.items() if self._pauses[kind])
        is_open = evaluations and not self._pauses["evaluation"]
        more = f" + {evaluations} evaluation{'s' if evaluations > 1 else ''}" if is_open else ""
        return f"about {clock(seconds)}{more} left"
