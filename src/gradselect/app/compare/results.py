"""The folder of results: one JSON file a run, each whole or not there."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradselect import UsageError
from gradselect.files import read_sealed, sealed, writing_aside

from .schedule import PlannedRun

FORMAT = 1
SUCCESS, FAILED = "success", "failed"
SECTIONS = ("run_info", "train_info", "meta_info", "gradselect")
OWN_KEYS = ("format", "suite", "protocol", "method", "method_settings", "lr", "seed", "role", "dirty")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result file that has been read.

    Args:
        path: of the file.
        values: all that it holds.
    """

    path: Path
    values: Mapping[str, Any]

    @property
    def own(self) -> Mapping[str, Any]:
        """The part that is not PEFT's."""
        return self.values["gradselect"]

    @property
    def succeeded(self) -> bool:
        return self.values["train_info"]["status"] == SUCCESS

    @property
    def error(self) -> str:
        return self.values["run_info"]["error_msg"]

    @property
    def validation_loss(self) -> float | None:
        """None also where the run failed."""
        return self.own["validation_loss"] if self.succeeded else None


@dataclass(frozen=True)
class ResultsFolder:
    """Where a comparison keeps what.

    METHOD.lr-RATE.seed-SEED.ROLE.json   one result a run; all that a report reads
    work/                                models in the making, logs, jobs: may be deleted, but then nothing resumes
    """

    root: Path

    def result_file(self, run: PlannedRun) -> Path:
        return self.root / f"{run.name}.json"

    @property
    def work(self) -> Path:
        return self.root / "work"

    def training(self, run: PlannedRun) -> Path:
        """The output folder of the training; one for both roles."""
        return self.work / run.training_name

    def log(self, run: PlannedRun) -> Path:
        return self.work / f"{run.name}.log"

    def job(self, run: PlannedRun) -> Path:
        return self.work / f"{run.name}.job.json"

    @property
    def forgetting_file(self) -> Path:
        """The loss of the base model, by protocol."""
        return self.work / "forgetting.json"

    def prepare(self) -> None:
        """Make the folders.

        Raises:
            UsageError: they cannot be made.
        """
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            (self.work / ".gitignore").write_text("*\n", "utf-8")
        except OSError as error:
            raise UsageError(f"the results folder {self.root} cannot be made: {error}") from None

    def read(self) -> tuple[list[Result], list[str]]:
        """The results there are, and one line for each other JSON file: which, and why it is skipped."""
        results, skipped = [], []
        for path in sorted(self.root.glob("*.json")):
            try:
                results.append(read_result(path))
            except UsageError as error:
                skipped.append(str(error))
        return results, skipped

    def retire(self, result: Result) -> Path:
        """Move a result that no longer belongs to the comparison out of a report's sight."""
        target = self.work / "superseded" / result.path.name
        target.parent.mkdir(exist_ok=True)
        os.replace(result.path, target)
        return target


def read_result(path: Path) -> Result:
    """The result in this file.

    Raises:
        UsageError: half-written, damaged, not a result of this format, or under the name of another run.
    """
    values = read_sealed(path, name=path.name)
    if not all(isinstance(values.get(section), dict) for section in SECTIONS):
        raise UsageError(f"{path.name}: no result of gradselect compare; it lacks one of {', '.join(SECTIONS)}")
    own = values["gradselect"]
    missing = [key for key in OWN_KEYS if key not in own]
    if missing or values["train_info"].get("status") not in (SUCCESS, FAILED):
        raise UsageError(f"{path.name}: no whole result; it lacks {', '.join(missing) or 'train_info.status'}")
    if own["format"] != FORMAT:
        raise UsageError(f"{path.name}: format {own['format']}, and this version reads format {FORMAT}")
    expected = f"{_run_of(path, own).name}.json"
    if path.name != expected:
        raise UsageError(f"{path.name}: holds the result of another run; give it the name {expected}")
    return Result(path=path, values=values)


def write_result(path: Path, values: Mapping[str, Any]) -> None:
    """Write a result aside, then give it its name; a number that is not finite becomes null.

    Raises:
        UsageError: it cannot be written.
    """
    with writing_aside(path) as aside:
        aside.write_text(
            json.dumps(sealed(_finite(values)), indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8"
        )


def _run_of(path: Path, own: Mapping[str, Any]) -> PlannedRun:
    try:
        return PlannedRun(method=str(own["method"]), lr=float(own["lr"]), seed=int(own["seed"]), role=own["role"])
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path.name}: damaged: method, lr, seed or role is none ({error})") from None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
