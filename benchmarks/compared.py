"""Figures of a committed comparison, and how the tables write them."""

from __future__ import annotations

import functools
from pathlib import Path

from gradselect.app.report.comparison import Comparison, compare_results
from gradselect.app.report.methods import Method
from gradselect.app.report.read_results import read_results
from gradselect.app.report.scores import Difference, Scores


@functools.cache
def comparison_of(folder: Path) -> Comparison:
    """Return the comparison of a folder of results, which several tables show."""
    return compare_results(read_results(folder, include_dirty=False))


def scores_of(comparison: Comparison, measure: str) -> Scores:
    """Return the scores of an evaluation, by its name."""
    return next(scores for scores in comparison.scores if scores.measure.name == measure)


def method_of(comparison: Comparison, name: str) -> Method:
    return next(method for method in comparison.methods if method.name == name)


def peak(comparison: Comparison, name: str) -> float:
    """Return the largest peak of counted bytes of a method's runs."""
    found = method_of(comparison, name).peak_bytes()
    assert found is not None
    return found


def steps_of(method: Method) -> int:
    """Return the number of steps of a method's runs: what fits its budget, else what the recipe says."""
    run = method.runs[0]
    budget = run.record.budget
    if budget is not None and budget.steps is not None:
        return budget.steps
    return run.content.run_info.train_config["run"]["steps"]


def cost_of_a_step(method: Method) -> str:
    """Return the calibrated cost of a step against the reference's; empty without a calibration."""
    budget = method.runs[0].record.budget
    return "" if budget is None or budget.ratio is None else f"{budget.ratio:.2f}"


def with_interval(difference: Difference | None, *, scale: float, decimals: int, verdict: str = "") -> str:
    """Write a difference with its interval and a verdict, bold if it is more than chance."""
    if difference is None:
        return ""
    value, low, high = (scale * figure for figure in (difference.value, *difference.interval))
    text = f"{value:+.{decimals}f} ({low:.{decimals}f} to {high:.{decimals}f}){verdict and f', {verdict}'}"
    return f"**{text}**" if difference.is_significant else text
