"""Recipes of the runs of a suite, with the steps that its budget allows, and which results are theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gradselect.app.recipe import Recipe
from gradselect.app.results import Calibration, ComparedRun, RunBudget

from .allotment import run_budget
from .budget import share_of, with_share, with_steps
from .protocol import has_settings
from .schedule import PlannedRun
from .suite import Suite


@dataclass(frozen=True)
class RunPlan:
    """Settings of every run.

    Args:
        suite: the suite.
        calibration: cost of the steps of its methods. None: the suite has no budget.
    """

    suite: Suite
    calibration: Calibration | None = None

    def recipe(self, run: PlannedRun, *, output: str | Path) -> Recipe:
        """Return the recipe of a run."""
        recipe = self.suite.training_recipe(run.method, lr=run.lr, seed=run.seed, output=output)
        steps = self._steps(run.method)
        if self.calibration is None or steps is None:
            return recipe if run.share == 1 else with_share(recipe, run.share)
        assert self.calibration.run_steps is not None
        return with_steps(recipe, steps=share_of(steps, run.share), run_steps=self.calibration.run_steps)

    def budget(self, method: str) -> RunBudget | None:
        """Return the budget of the runs of a method."""
        return None if self.calibration is None else run_budget(self.calibration, method)

    def error(self, method: str) -> str:
        """Return why the method could not be calibrated; empty if it could."""
        return "" if self.calibration is None else self.calibration.methods[method].error

    def why_not(self, record: ComparedRun) -> str | None:
        """Return why a result of a method of the suite is not one of these runs; None if it is."""
        method = record.method
        known = None if self.calibration is None else self.calibration.methods.get(method)
        if known is not None and known.left_out:
            return f"{method} {known.left_out}"
        if known is None and self.calibration is not None:
            return None  # a method that this call does not run
        if not self._has_settings(record):
            return f"{method} had other settings"
        steps, there = self._steps(method), None if record.budget is None else record.budget.steps
        return f"{method} has {steps} steps now, and had {there}" if steps not in (None, there) else None

    def of_an_older_calibration(self, records: Sequence[ComparedRun]) -> dict[str, int]:
        """Return the steps, by method, of results whose method the calibration does not know: it was made without."""
        known = None if self.calibration is None else self.calibration.methods
        return {
            record.method: record.budget.steps
            for record in records
            if known is not None and record.method not in known and record.budget and record.budget.steps
        }

    def _steps(self, method: str) -> int | None:
        return None if self.calibration is None else self.calibration.methods[method].steps

    def _has_settings(self, record: ComparedRun) -> bool:
        """True if a result's settings equal those of the suite."""
        run = PlannedRun(method=record.method, lr=1.0, seed=0, role="score", share=float(record.share))
        return has_settings(self.recipe(run, output="-").method, record.method_settings)
