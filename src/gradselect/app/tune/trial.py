"""One trial: a training run that keeps only its validation loss."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import torch
from transformers import Trainer, TrainerCallback

from gradselect import UsageError
from gradselect.app.inputs import read_inputs
from gradselect.app.progress import Stage, Stages
from gradselect.app.recipe import Recipe, dump_recipe
from gradselect.app.runtime import RunFolder
from gradselect.app.train import build_trainer, is_out_of_memory
from gradselect.usage import first_line

PRUNE_FROM = 0.25
"""No trial is pruned before this share of its steps, because losses during warm-up say little."""

OUT_OF_MEMORY = "out of memory"
"""Reason of a trial that was stopped by an allocator."""

End = Literal["finished", "pruned", "stopped", "vetoed"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """End of a trial.

    Args:
        end: "finished"; "pruned" for being worse than the median of the trials before it at the same step; "stopped"
            by a loss that is not finite, or by too little memory; "vetoed" before its start, because its plan does not
            fit the memory.
        loss: validation loss at the end; None unless it finished.
        reason: why it was stopped or vetoed.
    """

    end: End
    loss: float | None = None
    reason: str = ""


class SharedTrial:
    """A trial of a study that other processes write to as well: it reports in its turn.

    Args:
        trial: Optuna's trial.
        turn: waits until this process may write.
    """

    def __init__(self, trial: optuna.Trial, *, turn: Callable[[], AbstractContextManager[None]]) -> None:
        self._trial = trial
        self._turn = turn
        self.number = trial.number

    def report(self, value: float, step: int) -> None:
        """Keep the loss of a step."""
        with self._turn():
            self._trial.report(value, step)

    def should_prune(self) -> bool:
        """Return True if the study has seen enough of the trial."""
        return self._trial.should_prune()


class TrialWatch(TrainerCallback):
    """Reports every validation loss to the study, and stops the training when the study prunes the trial.

    Attributes:
        loss: the last validation loss, measured at step `evaluated_at`.
        is_pruned: True if the study stopped it.
    """

    def __init__(self, trial: SharedTrial, *, stage: Stage) -> None:
        self._trial = trial
        self._stage = stage
        self.loss = math.nan
        self.evaluated_at = -1
        self.is_pruned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stage.become(self._stage.what, total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stage.done = state.global_step

    def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: Mapping[str, float], **_: Any) -> None:
        self.loss, self.evaluated_at = metrics["eval_loss"], state.global_step
        if not math.isfinite(self.loss):
            raise UsageError(f"the validation loss of step {state.global_step} is {self.loss}")
        self._trial.report(self.loss, state.global_step)
        is_time = PRUNE_FROM * state.max_steps <= state.global_step < state.max_steps
        if is_time and self._trial.should_prune():
            self.is_pruned = control.should_training_stop = True


def carry_out(recipe: Recipe, trial: SharedTrial, *, folder: Path, stages: Stages) -> Outcome:
    """Train with the recipe and report validation losses to the study. Frees all memory afterwards.

    Raises:
        UsageError: the recipe does not fit model or data, which other values may not repair.
    """
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(_with_run(recipe, output=str(folder / "model"))), "utf-8")
    try:
        with stages.open(f"trial {trial.number}") as stage:
            watch = TrialWatch(trial, stage=stage)
            recipe = _with_run(recipe, save_every=None, report_to=())
            return _train(recipe, watch, folder=RunFolder(folder), stages=stages)
    finally:
        _free_memory()


def _with_run(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"run": recipe.run.model_copy(update=changes)})


def _train(recipe: Recipe, watch: TrialWatch, *, folder: RunFolder, stages: Stages) -> Outcome:
    # A learning rate with steps that are not finite is not worth having.
    recipe = _with_run(recipe, max_skipped_steps=0)
    try:
        trainer = build_trainer(recipe, read_inputs(recipe, stages=stages), folder=folder, stages=stages)
        return _end_of_training(trainer, watch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Outcome(end="stopped", reason=OUT_OF_MEMORY)


def _end_of_training(trainer: Trainer, watch: TrialWatch) -> Outcome:
    trainer.add_callback(watch)
    try:
        trainer.train()
        if not watch.is_pruned and watch.evaluated_at != trainer.state.global_step:
            trainer.evaluate()
    except UsageError as error:
        return Outcome(end="stopped", reason=first_line(error))
    return Outcome(end="pruned") if watch.is_pruned else Outcome(end="finished", loss=watch.loss)


def _free_memory() -> None:
    """Collect reference cycles of the trainer: the next trial needs the memory."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
