"""Short tables at the end of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from gradselect.app.progress import print_table
from gradselect.app.results import Forgetting, Result, Rung
from gradselect.app.stats import mean_and_deviation

from .schedule import is_at_edge


@dataclass(frozen=True, kw_only=True)
class MethodSummary:
    """Results of one method.

    Args:
        method: its name.
        lr: the best learning rate; None if no run of the search succeeded.
        rates: learning rates that were tried.
        results: successful runs at the best rate, by seed.
        rungs: search of the rate, the shortest runs first; none for a grid of one rate.
    """

    method: str
    lr: float | None
    rates: tuple[float, ...]
    results: tuple[Result, ...]
    rungs: tuple[Rung, ...] = ()

    def scores(self, evaluation: str) -> list[float]:
        """Return one score for each seed, without undefined ones."""
        values = [result.record.scores[evaluation].value for result in self.results]
        return [value for value in values if value is not None]

    @property
    def forgetting_names(self) -> tuple[str, ...]:
        """Names of the sets on which forgetting was measured; that of an only set may be empty."""
        return tuple(dict.fromkeys(name for result in self.results for name in result.record.forgotten))

    def forgotten(self, name: str) -> list[Forgetting]:
        """Return the losses on one set, one for each seed."""
        return [result.record.forgotten[name] for result in self.results if name in result.record.forgotten]

    @property
    def validation_losses(self) -> list[float]:
        losses = [result.record.validation_loss for result in self.results]
        return [loss for loss in losses if loss is not None]

    @property
    def steps(self) -> int | None:
        """Steps that the budget allowed; None without a budget of steps."""
        budgets = [budget for result in self.results if (budget := result.record.budget) is not None]
        return budgets[0].steps if budgets else None

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of the most frequent kind of step; the median of that over the seeds."""
        kinds = [seconds.by_kind.values() for result in self.results if (seconds := result.record.seconds) is not None]
        medians = [max(kind, key=lambda figures: figures.steps).median for kind in kinds if kind]
        return statistics.median(medians) if medians else None

    @property
    def peak_bytes(self) -> float | None:
        """Peak of weights, gradients, masters and optimizer state together; the largest of the seeds."""
        held = [held for result in self.results if (held := result.record.bytes) is not None]
        return max((one.peak["together"] for one in held), default=None)


def show_scores(console: Console, title: str, summaries: Sequence[MethodSummary]) -> None:
    """Print a row per method: best rate (with * at the edge of its grid), scores over seeds, step time, peak bytes."""
    results = [result for summary in summaries for result in summary.results]
    evaluations = list(dict.fromkeys(name for result in results for name in result.record.scores))
    # Without a budget all methods have the steps of the recipe.
    has_steps = any(summary.steps is not None for summary in summaries)
    rows = {
        summary.method: {
            "best rate": _rate(summary),
            **({"steps": _number(summary.steps, ",")} if has_steps else {}),
            "validation loss": _spread(summary.validation_losses, of=len(summary.results)),
            **{name: _spread(summary.scores(name), of=len(summary.results)) for name in evaluations},
            "seconds a step": _number(summary.step_seconds, ".4f"),
            "peak MiB": _number(None if summary.peak_bytes is None else summary.peak_bytes / 2**20, ",.1f"),
            "seeds": str(len(summary.results)),
        }
        for summary in summaries
    }
    print_table(console, "method", rows, title=title)
    if any(row["best rate"].endswith("*") for row in rows.values()):
        console.print("* at the edge of the grid", highlight=False, markup=False)


def show_forgetting(console: Console, summaries: Sequence[MethodSummary]) -> None:
    """Print a row per method: the loss of its models on each set that the base knew, and its rise above the base's.

    The base's loss stands in the heading.
    """
    names = list(dict.fromkeys(name for summary in summaries for name in summary.forgetting_names))
    rows: dict[str, dict[str, str]] = {}
    for summary in summaries:
        cells = rows[summary.method] = {}
        for name in names:
            before = next(one.before for each in summaries for one in each.forgotten(name))
            losses = summary.forgotten(name)
            cells[f"{name or 'loss'} (base {before:.4f})"] = _spread([one.after for one in losses])
            cells[f"{name} rise".lstrip()] = _rise([one.rise for one in losses])
    print_table(console, "method", rows, title="forgetting, nats per token")


def _rise(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):+.4f}" if values else "-"


def _rate(summary: MethodSummary) -> str:
    if summary.lr is None:
        return "all failed"
    return f"{summary.lr:g}{'*' if is_at_edge(summary.lr, summary.rates) else ''}"


def _spread(values: Sequence[float], *, of: int = 0) -> str:
    """Write mean and standard deviation over seeds, and how many these are if fewer than `of`."""
    if not values:
        return "-"
    mean, deviation = mean_and_deviation(values)
    some = f" ({len(values)} of {of})" if len(values) < of else ""
    return (f"{mean:.4f}" if deviation is None else f"{mean:.4f} ± {deviation:.4f}") + some


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
