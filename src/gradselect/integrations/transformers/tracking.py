"""Settings and pictures of the selection, for the trackers of a Trainer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_callback import CallbackHandler

from gradselect import BlockOptimizer, SparseOptimizer, UsageError
from gradselect.core import BlockHistory, EntryHistory, read_history

from .method_settings import method_settings
from .trackers import AbstractTracker, trackers_among

logger = logging.getLogger(__name__)

SHARE = 0.01
"""Share of the time of a run that pictures at checkpoints may take."""


class SelectionTracking:
    """Tells the trackers of a Trainer how its optimizer selects, and shows them what it selected.

    Once a run begins, the settings of the method go into its configuration. At the end, and at checkpoints if that
    costs next to no time, a picture of the whole run is logged. A tracker that fails is left alone from then on, and
    training goes on.

    Args:
        jsonl: file with the records of the steps before a resume; None: the picture begins at the resume.
    """

    def __init__(self, *, jsonl: str | Path | None = None) -> None:
        self._jsonl = jsonl
        self._optimizer: BlockOptimizer | SparseOptimizer | None = None
        self._history: Any = None
        self._trackers: list[AbstractTracker] = []
        self._is_described = True
        self._shown_step = -1
        self._next_time = 0.0

    def follow(self, optimizer: BlockOptimizer | SparseOptimizer, handler: CallbackHandler | None, *, on: bool) -> None:
        """Follow the steps of `optimizer` from now on, if it is `on` this rank that trackers write."""
        self._trackers = list(trackers_among(handler.callbacks)) if handler is not None and on else []
        self._is_described = not self._trackers
        self._next_time = time.monotonic()
        if self._trackers and self._optimizer is not optimizer:
            self._optimizer = optimizer
            self._history = self._earlier(optimizer)
            optimizer.add_record_hook(self._history)

    def describe(self) -> None:
        """Write the settings, once, as soon as all trackers have begun their run."""
        if not self._is_described and self._optimizer is not None:
            self._is_described = True
            settings = method_settings(self._optimizer)
            self._tell("settings", lambda tracker: tracker.write_settings(settings))

    def show(self, state: TrainerState, *, if_cheap: bool = False) -> None:
        """Log the picture. `if_cheap`: only if all pictures so far took no more than a hundredth of the time."""
        begun = time.monotonic()
        is_due = state.global_step != self._shown_step and not (if_cheap and begun < self._next_time)
        if not self._trackers or self._history is None or not self._history.steps or not is_due:
            return
        pixels = self._draw()
        if pixels is None:
            return
        self._shown_step = state.global_step
        self._tell("picture", lambda tracker: tracker.write_picture(pixels, step=state.global_step))
        now = time.monotonic()
        self._next_time = now + (now - begun) / SHARE

    def _earlier(self, optimizer: BlockOptimizer | SparseOptimizer) -> Any:
        """Return the history before a resume, as far as it was recorded, else an empty one."""
        is_of_blocks = isinstance(optimizer, BlockOptimizer)
        names = optimizer.blocks if is_of_blocks else ()
        if optimizer.num_steps and self._jsonl is not None and Path(self._jsonl).exists():
            try:
                found = read_history(self._jsonl, names=names)
            except UsageError as error:
                logger.warning("the picture of the selection begins at the resume: %s", error)
            else:
                if isinstance(found, BlockHistory if is_of_blocks else EntryHistory):
                    return found
        return BlockHistory(names=names) if is_of_blocks else EntryHistory()

    def _draw(self) -> Any:
        """Return the pixels of the picture; None without matplotlib, which is said once."""
        try:
            from gradselect.integrations.pictures import draw_blocks, draw_entries, to_pixels
        except ModuleNotFoundError as missing:
            logger.warning(
                "no picture of the selection for the trackers: %s is not installed; run: pip install matplotlib",
                missing.name,
            )
            self._trackers.clear()
            return None
        history = self._history
        return to_pixels(draw_entries(history) if isinstance(history, EntryHistory) else draw_blocks(history))

    def _tell(self, what: str, write: Callable[[AbstractTracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                if tracker.is_open():
                    write(tracker)
            # A tracker's library may raise anything, also for network and disk; training does not need it.
            except Exception as error:
                self._trackers.remove(tracker)
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                logger.warning(
                    "%s did not take the %s of the selection; training goes on: %s", tracker.name, what, reason
                )
