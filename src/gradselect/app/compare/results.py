"""Folder of a comparison: one result file for each run, and the work in progress."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gradselect import UsageError
from gradselect.app.results import SAMPLES, ComparedRun, Result, read_result, result_paths
from gradselect.files import plain_or_packed

from .schedule import PlannedRun


@dataclass(frozen=True)
class ResultsFolder:
    """Paths in the folder of a comparison.

    METHOD.lr-RATE.seed-SEED.ROLE.json   one result for each run; a report reads these. Short runs of the search have
                                         .share-SHARE before the role
    calibration.json                     cost of a step of each method, under a budget
    samples/                             answers of the base model and of seed 0 of each method to samples.prompts
    work/                                unfinished models, logs and jobs; without it nothing can be resumed
    """

    root: Path

    def result_file(self, run: PlannedRun) -> Path:
        return self.root / f"{run.name}.json"

    def existing_result(self, run: PlannedRun) -> Path | None:
        """Return the result file of the run, plain or packed by `gzip`; None if there is none."""
        return plain_or_packed(self.result_file(run))

    def samples_file(self, run: PlannedRun) -> Path:
        return self.root / SAMPLES / f"{run.training_name}.json"

    @property
    def work(self) -> Path:
        return self.root / "work"

    def training(self, run: PlannedRun) -> Path:
        """Output folder of the training; both roles share it."""
        return self.work / run.training_name

    def log(self, run: PlannedRun) -> Path:
        return self.work / f"{run.name}.log"

    def job(self, run: PlannedRun) -> Path:
        return self.work / f"{run.name}.job.json"

    @property
    def forgetting_file(self) -> Path:
        """Losses of the base model, by protocol."""
        return self.work / "forgetting.json"

    def prepare(self) -> None:
        """Create the folders.

        Raises:
            UsageError: they cannot be created.
        """
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            (self.work / ".gitignore").write_text("*\n", "utf-8")
        except OSError as error:
            raise UsageError(f"the results folder {self.root} cannot be made: {error}") from None

    def read(self) -> tuple[list[Result], list[str]]:
        """Return the results, and for every other JSON file a line with its name and why it is skipped."""
        results, skipped = [], []
        for path in result_paths(self.root):
            try:
                results.append(read_own_result(path))
            except UsageError as error:
                skipped.append(str(error))
        return results, skipped

    def retire(self, result: Result) -> Path:
        """Move a result that no longer belongs to the comparison to where no report sees it."""
        target = self.work / "superseded" / result.path.name
        target.parent.mkdir(exist_ok=True)
        os.replace(result.path, target)
        return target


def read_own_result(path: Path) -> Result:
    """Read a result file that has the name of its run.

    Raises:
        UsageError: as `read_result`, or the file holds the result of another run.
    """
    result = read_result(path)
    expected = f"{_planned(result.record).name}.json"
    if path.name.removesuffix(".gz") != expected:
        raise UsageError(f"{path.name}: holds the result of another run; give it the name {expected}")
    return result


def _planned(record: ComparedRun) -> PlannedRun:
    return PlannedRun(method=record.method, lr=record.lr, seed=record.seed, role=record.role, share=float(record.share))
