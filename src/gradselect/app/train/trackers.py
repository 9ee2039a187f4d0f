"""Trackers for the curves of a run. A tracker that fails does not stop the run."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks

from gradselect import UsageError
from gradselect.app.recipe import Recipe
from gradselect.app.runtime import RunFolder

logger = logging.getLogger(__name__)


class TolerantTracker(TrainerCallback):
    """Forwards events to a tracker until its first error, which it logs.

    Args:
        name: name of the tracker in the recipe.
        tracker: callback of transformers.
    """

    def __init__(self, name: str, tracker: TrainerCallback) -> None:
        self._name = name
        self._tracker: Any = tracker

    @property
    def tracker(self) -> Any:
        """The callback of transformers; None once it has failed."""
        return self._tracker

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._forward("on_train_begin", args, state, control, parts)

    def on_log(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._forward("on_log", args, state, control, parts)

    def on_save(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._forward("on_save", args, state, control, parts)

    def on_train_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._forward("on_train_end", args, state, control, parts)

    def _forward(self, event: str, args: Any, state: Any, control: Any, parts: dict[str, Any]) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, event)(args, state, control, **parts)
        # A tracker's library may raise anything, also for network and disk; the run does not need it.
        except Exception as error:
            self._tracker = None
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            logger.warning("run.report_to=%s has failed; the run continues without it: %s", self._name, reason)


class ResumedTensorBoard(TensorBoardCallback):
    """Curves in a folder. Resuming hides the points after the checkpoint."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self.logging_dir = str(folder.curves)

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        if state.is_world_process_zero and self.tb_writer is None and state.global_step:
            self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **parts)


def trackers(recipe: Recipe, folder: RunFolder) -> list[TrainerCallback]:
    """Return a callback for each tracker of the recipe.

    Raises:
        UsageError: a tracker is not installed.
    """
    return [TolerantTracker(name, _tracker(name, folder)) for name in recipe.run.report_to]


def _tracker(name: str, folder: RunFolder) -> TrainerCallback:
    if find_spec(name) is None:
        raise UsageError(f"run.report_to={name} is not installed; run: pip install {name}")
    if name == "tensorboard":
        return ResumedTensorBoard(folder)
    (callback,) = get_reporting_integration_callbacks([name])
    return callback()
