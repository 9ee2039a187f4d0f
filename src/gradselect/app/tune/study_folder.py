"""Folder of a search, which several processes may share. It needs no Optuna."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradselect import UsageError
from gradselect.app.train import differences
from gradselect.files import LOCK_NAME, is_owned, owned, taking_turns
from gradselect.usage import find_differences

TURN_SECONDS = 120.0
"""Longest wait for another process's turn. Turns take milliseconds; only an older version locks the whole search."""


@dataclass(frozen=True)
class StudyFolder:
    """Paths in the folder of a search.

    study.json   the recipe, the ranges, the seed, and fingerprints of model and data
    trials.db    every trial with its curve, in Optuna's format
    trials/N/    recipe.yaml of trial N and, for methods that select, its records
    running/N    locked by the process that carries out trial N
    best.yaml    the recipe with the best values
    allocation.json  of --space adapters: the layers and their ranks
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
    def allocation(self) -> Path:
        return self.root / "allocation.json"

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

    def turn(self, *, warn: bool = False) -> AbstractContextManager[None]:
        """Wait for this process's turn to write into the study. Take one for each read or write that belongs together.

        Raises:
            UsageError: another process holds the folder.
        """
        return taking_turns(self.root, seconds=TURN_SECONDS, name="--study", warn=warn)

    def owning(self, number: int) -> AbstractContextManager[None]:
        """Own trial `number` until the block or the process ends."""
        return owned(self._running(number))

    def is_owned(self, number: int) -> bool:
        """Return True if a process that is alive carries out trial `number`."""
        return is_owned(self._running(number))

    def _running(self, number: int) -> Path:
        return self.root / "running" / str(number)

    def keep_messages(self, messages: Sequence[str]) -> None:
        """Append messages of the libraries, if there is a study."""
        if messages and self.description.exists():
            with self.messages.open("a", encoding="utf-8") as file:
                file.writelines(f"{message}\n" for message in messages)


def check_folder(folder: StudyFolder, now: Mapping[str, Any]) -> None:
    """Check that the folder is new or holds the study that `now` describes.

    Raises:
        UsageError: it holds something else; names what differs.
    """
    if not folder.root.exists():
        return
    if not folder.description.is_file():
        # The lock is there while a study is being made.
        if not folder.root.is_dir() or any(path.name != LOCK_NAME for path in folder.root.iterdir()):
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
        "--search": description.get("search"),
        "--sampler": description.get("sampler", "tpe"),
        "--seed": description.get("seed"),
        "--space adapters": description.get("adapters"),
        "run.evaluate_every": run["evaluate_every"],
    }
