"""Search loop: trial after trial, until there are enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.console import Console

from gradselect import UsageError
from gradselect.app.inputs import read_inputs
from gradselect.app.progress import Stages
from gradselect.app.recipe import Recipe
from gradselect.app.runtime import check_one_process, take_device
from gradselect.app.train import describe_start

from .ranges import SearchRange, numbers_of, with_values
from .study import StudyFolder, ended, next_trial, opened
from .trial import carry_out
from .trial_table import TrialSummary, best_of, edge_notes, show_table, write_best


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


def search(
    recipe: Recipe, *, folder: StudyFolder, ranges: Sequence[SearchRange], num_trials: int, seed: int, console: Console
) -> TuneResult:
    """Run trials until there are `num_trials`; see `tune`."""
    _check(recipe, num_trials=num_trials)
    stages = Stages(console)
    with opened(folder, _describe(recipe, ranges, seed=seed, stages=stages)) as study:
        for line in _opening(study, recipe, ranges, num_trials=num_trials, folder=folder):
            _print(console, line)
        while len(ended(study)) < num_trials:
            _one_trial(study, recipe, ranges, folder=folder, seed=seed, stages=stages)
        trials = tuple(map(TrialSummary.of, ended(study)))
    return _conclude(recipe, trials, ranges, folder=folder, console=console)


def _check(recipe: Recipe, *, num_trials: int) -> None:
    check_one_process()
    take_device(recipe.run.device)
    if num_trials < 1:
        raise UsageError(f"--trials {num_trials}: give a positive number, e.g. --trials 20")
    if recipe.data.validation is None:
        raise UsageError(
            "trials are compared by their loss on validation examples, and data.validation is not set; "
            "hold out a share of the training rows, e.g. data.validation=0.05, or name a file"
        )


def _describe(recipe: Recipe, ranges: Sequence[SearchRange], *, seed: int, stages: Stages) -> dict[str, Any]:
    """Return everything that decides the trials, including the contents of model and data."""
    start = describe_start(recipe, read_inputs(recipe, stages=stages), command=()).values()
    kept = ("started_at", "recipe", "model", "data", "versions", "machine")
    return {**{key: start[key] for key in kept}, "search": [searched.exact for searched in ranges], "seed": seed}


def _opening(
    study: optuna.Study, recipe: Recipe, ranges: Sequence[SearchRange], *, num_trials: int, folder: StudyFolder
) -> list[str]:
    num_ended = len(ended(study))
    lines = [f"study      {folder.root}, {num_trials} trials" + (f", {num_ended} of them done" if num_ended else "")]
    lines += [f"search     {searched}" for searched in ranges]
    if recipe.run.evaluate_every is None:
        lines.append("note       no trial is pruned: run.evaluate_every is not set; write e.g. run.evaluate_every=50")
    return lines


def _one_trial(
    study: optuna.Study,
    recipe: Recipe,
    ranges: Sequence[SearchRange],
    *,
    folder: StudyFolder,
    seed: int,
    stages: Stages,
) -> None:
    numbers = numbers_of(recipe)
    trial = next_trial(study, ranges, own={searched.key: numbers[searched.key] for searched in ranges}, seed=seed)
    changed = with_values(recipe, trial.params, source=f"trial {trial.number}")
    outcome = carry_out(changed, trial, folder=folder.trial(trial.number), stages=stages)
    trial.set_user_attr("end", outcome.end)
    trial.set_user_attr("reason", outcome.reason)
    # A stopped trial counts as pruned, so that the sampler avoids such values.
    ended_trial = study.tell(
        trial, outcome.loss, state=TrialState.COMPLETE if outcome.end == "finished" else TrialState.PRUNED
    )
    stages.say(TrialSummary.of(ended_trial).line())


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
        reasons = dict.fromkeys(trial.reason for trial in trials)
        raise UsageError(
            "\n  ".join([f"none of {len(trials)} trials finished; search smaller learning rates:", *reasons])
        )
    tuned = write_best(recipe, best, num_trials=len(trials), folder=folder)
    show_table(console, trials, best)
    for note in edge_notes(best, ranges):
        _print(console, f"note       {note}")
    _print(console, f"next: gradselect train {folder.best_recipe}")
    return TuneResult(recipe=tuned, path=folder.best_recipe, best=best, trials=tuple(trials))


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
