"""Study: the trials of a search, in Optuna's format."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from gradselect import UsageError
from gradselect.files import LOCK_NAME, write_atomically

from .study_folder import TURN_SECONDS, StudyFolder, check_folder

STARTUP_TRIALS = 5
"""Number of trials that are drawn at random, before TPE proposes values, and that must end before one is pruned."""
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@contextmanager
def opened(folder: StudyFolder, description: Mapping[str, Any]) -> Iterator[optuna.Study]:
    """Open the study in the folder, or make a new one. Other processes may have it open too.

    Raises:
        UsageError: the folder holds something else or another study, or cannot be made.
    """
    # Nothing is written into a folder of something else. One with a lock may be a study that another process is making:
    # its turn is waited for, and the folder is checked in ours.
    try:
        check_folder(folder, description)
    except UsageError:
        if not (folder.root / LOCK_NAME).exists():
            raise
    with _quiet_optuna(), ExitStack() as connections:
        with folder.turn(warn=True):
            check_folder(folder, description)
            _check_storage(folder)
            if not folder.description.exists():
                write_atomically(folder.description, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
            study = _load(connections.enter_context(_connected(folder)))
        yield study


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that finished or were stopped, oldest first, without those that were interrupted."""
    return study.get_trials(states=ENDED)


def running(study: optuna.Study, folder: StudyFolder) -> list[FrozenTrial]:
    """Return the trials that processes carry out now. Gives up those whose process has died. Call it in a turn."""
    alive = []
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        if folder.is_owned(trial.number):
            alive.append(trial)
        else:
            # Its values will be proposed again.
            study.tell(trial.number, state=TrialState.FAIL)
    return alive


def _check_storage(folder: StudyFolder) -> None:
    """Refuse a damaged file of trials. Optuna's engine would keep it open, and nothing could close it."""
    if not folder.storage.exists():
        return
    try:
        with closing(sqlite3.connect(folder.storage, timeout=TURN_SECONDS)) as connection:
            connection.execute("PRAGMA schema_version")
    except sqlite3.DatabaseError as error:
        raise UsageError(
            f"the trials in {folder.storage} cannot be read ({error}); choose another --study, or put a copy of the "
            "file there"
        ) from error


@contextmanager
def _connected(folder: StudyFolder) -> Iterator[optuna.storages.RDBStorage]:
    """Open the file of trials. Optuna's own check of its schema raises while the file is open, so it is made here."""
    url = f"sqlite:///{folder.storage}"
    storage = optuna.storages.RDBStorage(
        url, engine_kwargs={"connect_args": {"timeout": TURN_SECONDS}}, skip_compatibility_check=True
    )
    try:
        there, here = storage.get_current_version(), storage.get_head_version()
        if there != here:
            raise UsageError(
                f"the trials in {folder.storage} have the schema {there} of another version of Optuna; optuna "
                f"{optuna.__version__} has {here}. If that is newer, keep a copy of the file and run: optuna storage "
                f"upgrade --storage {url}; else install the Optuna that made it, or choose another --study"
            )
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _load(storage: optuna.storages.RDBStorage) -> optuna.Study:
    return optuna.create_study(
        storage=storage,
        study_name="gradselect",
        load_if_exists=True,
        direction="minimize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
    )


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
    try:
        yield
    finally:
        optuna.logging.disable_propagation()
        optuna.logging.enable_default_handler()
