"""Study: the trials of a search in a folder, and the values of the next trial."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from gradselect import UsageError
from gradselect.app.train import differences
from gradselect.files import locked, write_atomically
from gradselect.usage import find_differences

from .ranges import SearchRange

STARTUP_TRIALS = 5
"""Number of trials that are drawn at random, before TPE proposes values, and that must end before one is pruned."""
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class StudyFolder:
    """Paths in the folder of a search.

    study.json   the recipe, the ranges, the seed, and fingerprints of model and data
    trials.db    every trial with its curve, in Optuna's format
    trials/N/    recipe.yaml of trial N and, for methods that select, its records
    best.yaml    the recipe with the best values
    messages.log warnings and log lines of the libraries
    """

    root: Path

    @property
    def description(self) -> Path:
        return self.root / "study.json"

    @property
    def storage(self) -> Path:
        return self.root / "trials.db"

    @property
    def best_recipe(self) -> Path:
        return self.root / "best.yaml"

    @property
    def best_output(self) -> Path:
        return self.root / "best"

    @property
    def messages(self) -> Path:
        return self.root / "messages.log"

    def trial(self, number: int) -> Path:
        return self.root / "trials" / str(number)

    def keep_messages(self, messages: Sequence[str]) -> None:
        """Append messages of the libraries, if there is a study."""
        if messages and self.description.exists():
            with self.messages.open("a", encoding="utf-8") as file:
                file.writelines(f"{message}\n" for message in messages)


@contextmanager
def opened(folder: StudyFolder, description: Mapping[str, Any]) -> Iterator[optuna.Study]:
    """Open the study in the folder, or a new one, and lock it.

    Raises:
        UsageError: the folder holds something else or another study, or another process works on it.
    """
    _check_folder(folder, description)
    with locked(folder.root, name="--study"):
        if not folder.description.exists():
            write_atomically(folder.description, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
        with _quiet_optuna():
            storage = optuna.storages.RDBStorage(f"sqlite:///{folder.storage}")
            try:
                yield _load(storage)
            finally:
                storage.remove_session()
                storage.engine.dispose()


def next_trial(
    study: optuna.Study, ranges: Sequence[SearchRange], *, own: Mapping[str, Any], seed: int
) -> optuna.Trial:
    """Return the next trial. The first has the recipe's `own` values if they are in range; then TPE proposes values.

    Bergstra, Bardenet, Bengio, Kégl, "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011. The seed of
    each draw depends on the number of trials that have ended, so an interrupted search proposes the same values.
    """
    num_ended = len(ended(study))
    seed_of_draw = random.Random(f"gradselect/tune/{seed}/{num_ended}").randrange(2**32)
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed_of_draw)
    is_queued = bool(study.get_trials(states=(TrialState.WAITING,)))
    if num_ended == 0 and not is_queued and all(searched.has(own[searched.key]) for searched in ranges):
        study.enqueue_trial(dict(own))
    return study.ask({searched.key: _distribution(searched) for searched in ranges})


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that finished or were stopped, oldest first, without those that were interrupted."""
    return study.get_trials(states=ENDED)


def _load(storage: optuna.storages.RDBStorage) -> optuna.Study:
    study = optuna.create_study(
        storage=storage,
        study_name="gradselect",
        load_if_exists=True,
        direction="minimize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
    )
    # The folder is locked, so a trial marked as running was interrupted. Its values will be proposed again.
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def _distribution(searched: SearchRange) -> BaseDistribution:
    if searched.whole:
        return IntDistribution(int(searched.low), int(searched.high), log=searched.log)
    return FloatDistribution(searched.low, searched.high, log=searched.log)


def _check_folder(folder: StudyFolder, now: Mapping[str, Any]) -> None:
    if not folder.root.exists():
        return
    if not folder.description.is_file():
        if not folder.root.is_dir() or any(folder.root.iterdir()):
            raise UsageError(f"--study {folder.root} exists and holds no study; choose another folder")
        return
    before = json.loads(folder.description.read_text("utf-8"))
    different = list(differences(before, now))
    different += [f"{key}: {old!r} then, {new!r} now" for key, old, new in find_differences(_own(before), _own(now))]
    if different:
        heading = (
            f"the study in {folder.root} is another one; continue it with its own settings, or choose another --study:"
        )
        raise UsageError("\n  ".join([heading, *different]))


def _own(description: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a resumed run may change and a study may not: its trials are compared step by step."""
    run = description["recipe"]["run"]
    return {
        "--search": description["search"],
        "--seed": description["seed"],
        "run.evaluate_every": run["evaluate_every"],
    }


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    try:
        yield
    finally:
        optuna.logging.disable_propagation()
        optuna.logging.enable_default_handler()
