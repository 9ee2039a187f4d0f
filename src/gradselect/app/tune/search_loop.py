"""Search loop: trial after trial, until there are enough."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from gradselect import UsageError
from gradselect.app.inputs import read_inputs
from gradselect.app.progress import Stages
from gradselect.app.recipe import Recipe

from .description import check_search, described
from .memory_check import MemoryCheck
from .proposals import Sampler, next_trial
from .ranges import SearchRange, numbers_of, with_values
from .study import ended, opened, running
from .study_folder import StudyFolder
from .trial import OUT_OF_MEMORY, Outcome, SharedTrial, carry_out
from .trial_table import TrialSummary, best_of, edge_notes, show_table, write_best

WAIT_SECONDS = 1.0
"""Time between two looks at trials of other processes."""

MOST_VETOES = 20
"""Number of proposals in a row that may be too large for the memory."""

SMALLER_TRIALS = "make the trials smaller, e.g. with run.batch_size and run.accumulation"


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """Result of a search.

    Args:
        recipe: the recipe with the best values; also in `path`.
        path: file of that recipe, ready for `gradselect train`.
        best: the trial with these values.
        trials: all trials that ended, oldest first.
    """

    recipe: Recipe
    path: Path
    best: TrialSummary
    trials: tuple[TrialSummary, ...]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Options of a search.

    Args:
        ranges: of the values.
        num_trials: number of trials that the study has in the end, without those that could not fit the memory.
        seed: seed of the proposals.
        sampler: what proposes them.
        limit: bytes that a trial may take. None: the memory of the device.
    """

    ranges: Sequence[SearchRange]
    num_trials: int
    seed: int
    sampler: Sampler = "tpe"
    limit: int | None = None


def search(recipe: Recipe, *, folder: StudyFolder, options: SearchOptions, console: Console) -> TuneResult:
    """Run trials until there are enough; see `tune`."""
    check_search(recipe)
    stages = Stages(console)
    check = MemoryCheck(recipe, limit=options.limit)
    with opened(folder, _describe(recipe, options, stages=stages)) as study:
        for line in _opening(study, recipe, options, folder=folder):
            _print(console, line)
        if check.note:
            _print(console, f"note       {check.note}")
        worker = _Worker(study, recipe, options, folder=folder, check=check, stages=stages)
        while worker.carry_on():
            pass
        trials = tuple(map(TrialSummary.of, ended(study)))
        with folder.turn():
            return _conclude(recipe, trials, options.ranges, folder=folder, console=console)


def _describe(recipe: Recipe, options: SearchOptions, *, stages: Stages) -> dict[str, Any]:
    """Return everything that decides the trials, including the contents of model and data."""
    return {
        **described(recipe, read_inputs(recipe, stages=stages)),
        "search": [searched.exact for searched in options.ranges],
        "seed": options.seed,
        "sampler": options.sampler,
    }


def _opening(study: optuna.Study, recipe: Recipe, options: SearchOptions, *, folder: StudyFolder) -> list[str]:
    num_ended = len(counted(study))
    lines = [
        f"study      {folder.root}, {options.num_trials} trials" + (f", {num_ended} of them done" if num_ended else "")
    ]
    lines += [f"search     {searched}" for searched in options.ranges]
    if recipe.run.evaluate_every is None:
        lines.append("note       no trial is pruned: run.evaluate_every is not set; write e.g. run.evaluate_every=50")
    return lines


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that have ended and count: not those that could not fit the memory, which took no time."""
    return [trial for trial in ended(study) if trial.user_attrs["end"] != "vetoed"]


class _Worker:
    """One of the processes that work on a study."""

    def __init__(
        self,
        study: optuna.Study,
        recipe: Recipe,
        options: SearchOptions,
        *,
        folder: StudyFolder,
        check: MemoryCheck,
        stages: Stages,
    ) -> None:
        self._study, self._recipe, self._options = study, recipe, options
        self._folder, self._check, self._stages = folder, check, stages
        self._is_waiting = False
        # Reasons of the last proposals of this process in a row: earlier ones may have had a smaller limit.
        self._vetoes: list[str] = []

    def carry_on(self) -> bool:
        """Carry out the next trial, or wait for other processes. Returns False if the study has enough trials."""
        with ExitStack() as ownership:
            with self._folder.turn():
                alive = running(self._study, self._folder)
                num_done = len(counted(self._study))
                if num_done >= self._options.num_trials:
                    return False
                trial = None
                if num_done + len(alive) < self._options.num_trials:
                    self._check_vetoes()
                    trial = self._ask(alive)
                    # In the same turn: a running trial without an owner would be given up.
                    ownership.enter_context(self._folder.owning(trial.number))
            if trial is None:
                self._wait(len(alive))
            else:
                self._is_waiting = False
                self._carry_out(trial, ownership)
        return True

    def _ask(self, alive: Sequence[FrozenTrial]) -> optuna.Trial:
        numbers, options = numbers_of(self._recipe), self._options
        own = {searched.key: numbers[searched.key] for searched in options.ranges}
        return next_trial(self._study, options.ranges, own=own, seed=options.seed, sampler=options.sampler, alive=alive)

    def _carry_out(self, trial: optuna.Trial, ownership: ExitStack) -> None:
        changed = with_values(self._recipe, trial.params, source=f"trial {trial.number}")
        reason = self._check.complaint(changed)
        self._vetoes = [*self._vetoes, reason] if reason else []
        if reason:
            outcome = Outcome(end="vetoed", reason=reason)
        else:
            shared = SharedTrial(trial, turn=self._folder.turn)
            outcome = carry_out(changed, shared, folder=self._folder.trial(trial.number), stages=self._stages)
        with self._folder.turn():
            trial.set_user_attr("end", outcome.end)
            trial.set_user_attr("reason", outcome.reason)
            # A stopped or vetoed trial counts as pruned, so that the sampler avoids such values.
            state = TrialState.COMPLETE if outcome.end == "finished" else TrialState.PRUNED
            ended_trial = self._study.tell(trial, outcome.loss, state=state)
            ownership.close()
        self._stages.say(TrialSummary.of(ended_trial).line())

    def _wait(self, num_running: int) -> None:
        if not self._is_waiting:
            self._stages.say(f"waiting for {num_running} trials of other processes")
        self._is_waiting = True
        time.sleep(WAIT_SECONDS)

    def _check_vetoes(self) -> None:
        """Refuse to go on where the sampler proposes nothing that fits."""
        if len(self._vetoes) >= MOST_VETOES:
            raise UsageError(
                f"the last {MOST_VETOES} proposals cannot fit; search smaller values, or {SMALLER_TRIALS}. The last "
                f"one: {self._vetoes[-1]}"
            )


def _conclude(
    recipe: Recipe,
    trials: Sequence[TrialSummary],
    ranges: Sequence[SearchRange],
    *,
    folder: StudyFolder,
    console: Console,
) -> TuneResult:
    best = best_of(trials)
    if best is None:
        raise UsageError(_why_none_finished(trials))
    tuned = write_best(recipe, best, num_trials=len(trials), folder=folder)
    show_table(console, trials, best)
    for note in edge_notes(best, ranges):
        _print(console, f"note       {note}")
    _print(console, f"next: gradselect train {folder.best_recipe}")
    return TuneResult(recipe=tuned, path=folder.best_recipe, best=best, trials=tuple(trials))


def _why_none_finished(trials: Sequence[TrialSummary]) -> str:
    """Return the reasons, the most common first, and what helps against most of them."""
    num_short = sum(trial.end == "vetoed" or trial.reason == OUT_OF_MEMORY for trial in trials)
    advice = SMALLER_TRIALS if 2 * num_short > len(trials) else "search smaller learning rates"
    reasons = Counter(trial.reason or trial.end for trial in trials).most_common()
    lines = [f"{reason} ({count} trials)" if count > 1 else reason for reason, count in reasons]
    return "\n  ".join([f"none of {len(trials)} trials finished; {advice}:", *lines])


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
