"""A suite so small that a run takes a second, and its runs in this process instead of one each."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from train_fixtures import recipe_values, write_model, write_sums

from gradselect import UsageError
from gradselect.app.compare import Suite, git_state, runs
from gradselect.app.compare.comparison import Comparison
from gradselect.app.compare.git_state import SourceState
from gradselect.app.compare.job import Job
from gradselect.app.compare.results import ResultsFolder
from gradselect.app.compare.side_by_side import SideBySide
from gradselect.app.compare.suite import parse_suite
from gradselect.app.compare.worker import carry_out

FULL = {"method": {"name": "full"}, "rates": [1e-3, 1e-2]}
BLOCKS = {"method": {"name": "uniform", "count": 2}, "rates": [1e-2]}
MISFIT = {"method": {"name": "uniform", "count": 99}, "rates": [1e-2]}
"""More blocks than the model has: every run fails."""


def write_place(folder: Path) -> Path:
    """A model, sums to train on, text to forget."""
    write_model(folder / "model")
    write_sums(folder / "sums.jsonl")
    (folder / "known.txt").write_text("one and one is two, and two and two is four.", "utf-8")
    return folder


def suite_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """A suite of two methods on what `write_place` wrote."""
    recipe = recipe_values(folder, data={"validation": 0.2}, run={"steps": 2})
    del recipe["method"], recipe["optimizer"]["lr"], recipe["run"]["output"]
    return {
        "name": "sums",
        "recipe": recipe,
        "evaluations": {"sums": {"task": "loss", "data": str(folder / "sums.jsonl"), "limit": 6}},
        "forgetting": {"task": "loss", "data": str(folder / "known.txt")},
        "seeds": 2,
        "methods": {"full": FULL, "uniform 2": BLOCKS},
        **changes,
    }


def make_suite(folder: Path, **changes: Any) -> Suite:
    return parse_suite(suite_values(folder, **changes), source="suite")


def write_suite(folder: Path, path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(suite_values(folder, **changes)), "utf-8")
    return path


class Runner:
    """Runs comparisons with the runs in this process, and keeps what was said and which runs there were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, dirty: bool = False) -> None:
        self.ran: list[str] = []
        self.said = ""
        self.dirty = dirty
        self.before_job: Callable[[Job], None] = lambda job: None
        monkeypatch.setattr(runs, "run_job", self._run_job)
        monkeypatch.setattr(git_state, "source_state", lambda: SourceState(commit="c0ffee", dirty=self.dirty))

    def __call__(
        self,
        suite: Suite,
        results: Path,
        *,
        only: Sequence[str] = (),
        seeds: int | None = None,
        resume: bool = False,
        recalibrate: bool = False,
        calibrate_only: bool = False,
        side_by_side: SideBySide | None = None,
    ) -> list[Any]:
        self.ran, stream = [], io.StringIO()
        console = Console(file=stream, width=200)
        comparison = Comparison(
            suite,
            folder=ResultsFolder(results),
            seeds=seeds or suite.seeds,
            resume=resume,
            recalibrate=recalibrate,
            calibrate_only=calibrate_only,
            side_by_side=side_by_side,
            console=console,
            command=["gradselect", "compare"],
        )
        try:
            return comparison.run(suite.chosen(only))
        finally:
            self.said = stream.getvalue()

    def _run_job(self, job_file: Path, log: Path) -> str | None:
        job = Job.model_validate_json(job_file.read_text("utf-8"))
        self.ran.append(job.result.name.removesuffix(".json"))
        try:
            self.before_job(job)
            carry_out(job)
        except UsageError as error:
            return str(error)
        return None
