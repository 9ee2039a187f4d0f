"""Scores with intervals, and which differences are significant."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from gradselect.app.results import Item, Result
from gradselect.app.stats import (
    MEAN_CHRF,
    Interval,
    Outcomes,
    degrees_of_freedom,
    draw_means,
    holm_adjusted,
    mcnemar,
    percentile_interval,
    student_interval,
    two_sided_p,
    wilson_interval,
)

from . import number_format as words
from .methods import Method

LEVEL = 0.05
VALIDATION = "validation"

LEAST_ITEMS = 2
"""Items that a bootstrap needs. Over a single one intervals have no width, and any difference has a p-value of 0."""

FEW_ITEMS = 30
"""With fewer, 95 % intervals of log-normal values hold the true mean in 81 to 88 % of cases, of normal ones in 92."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A figure that models are compared by.

    Args:
        name: of the evaluation in the suite, or "validation" for the loss that selects the rate.
        metric: "accuracy", "loss", or a metric of a classification.
    """

    name: str
    metric: str

    @property
    def title(self) -> str:
        return self.name if self.name == self.metric else f"{self.name} {self.metric}"

    @property
    def is_share(self) -> bool:
        return self.metric == "accuracy"

    @property
    def higher_is_better(self) -> bool:
        return "loss" not in self.metric

    @property
    def unit(self) -> str:
        """Unit of a difference."""
        if self.is_share:
            return "points"
        return "" if self.higher_is_better else "nats per token"

    @property
    def scale(self) -> float:
        """Factor from a value to the figure shown."""
        return 100.0 if self.is_share else 1.0

    def show(self, value: float | None) -> str:
        return words.share(value, digits=1) if self.is_share else words.number(value)

    def show_interval(self, interval: Interval | None) -> str:
        if interval is None:
            return ""
        low, high = (words.number(self.scale * limit, digits=1 if self.is_share else 3) for limit in interval)
        return f"{low} to {high}"

    def show_difference(self, value: float) -> str:
        return words.number(self.scale * value, digits=1 if self.is_share else 3, sign=True)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A method's score.

    Args:
        value: mean over the seeds.
        interval: 95 %; None if it is unknown.
        source: "items", "seeds" or "items and seeds": the interval is over these.
        num_runs: runs that the mean is over: those with a finite value.
    """

    value: float
    interval: Interval | None
    source: str
    num_runs: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """First method minus second, on the same items with the same seeds.

    Args:
        value: difference of the scores.
        interval: 95 % of the bootstrap over items and seeds.
        p_value: McNemar for right and wrong, bootstrap for a loss.
        adjusted: p-value after Holm's correction for all differences of its table.
    """

    first: str
    second: str
    value: float
    interval: Interval
    p_value: float
    adjusted: float

    @property
    def is_significant(self) -> bool:
        """True if the adjusted p-value is below `LEVEL` and the interval, which covers seeds too, excludes zero."""
        low, high = self.interval
        return self.adjusted < LEVEL and not low <= 0 <= high


@dataclass(frozen=True, kw_only=True)
class Scores:
    """All methods by one measure."""

    measure: Measure
    estimates: dict[str, Estimate]
    table: ItemTable | None

    def order(self, name: str) -> tuple[float, str]:
        """Sort key: the best method first, methods without a score last."""
        if name not in self.estimates:
            return math.inf, name
        value = self.estimates[name].value
        return (-value if self.measure.higher_is_better else value), name

    def best(self) -> str:
        return min(self.estimates, key=self.order)

    def against(self, reference: str) -> list[Difference]:
        """Differences of every method to `reference`, the best method first."""
        others = sorted((name for name in self.estimates if name != reference), key=self.order)
        return self.differences([(name, reference) for name in others])

    def pairs(self) -> list[Difference]:
        """Differences of all pairs, the better method first."""
        return self.differences(list(combinations(sorted(self.estimates, key=self.order), 2)))

    def untested(self, reference: str) -> list[str]:
        """Methods that are not compared with `reference`, the best first: no seed has items of both."""
        others = sorted((name for name in self.estimates if name != reference), key=self.order)
        return [name for name in others if self.table is None or not self.table.shared_seeds(name, reference)]

    def differences(self, pairs: Sequence[tuple[str, str]]) -> list[Difference]:
        """Differences of the first to the second of each pair, with Holm's correction for these pairs."""
        if self.table is None:
            return []
        found = [(pair, self.table.compare(*pair)) for pair in pairs if self.table.shared_seeds(*pair)]
        adjusted = holm_adjusted([p_value for _, (_, _, p_value) in found])
        return [
            Difference(first=first, second=second, value=value, interval=interval, p_value=p_value, adjusted=holm)
            for ((first, second), (value, interval, p_value)), holm in zip(found, adjusted, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class ItemTable:
    """Outcomes of all runs with items, on the items that all of them have.

    Args:
        rows: row of each run in `outcomes`, by method and seed.
        outcomes: of the runs.
        drawn: shape (draws, runs); bootstrap over items.
        is_share: True if items are right or wrong.
        most_items: items of the run that has most of them.
    """

    rows: dict[tuple[str, int], int]
    outcomes: Outcomes
    drawn: np.ndarray
    is_share: bool
    most_items: int

    @property
    def num_items(self) -> int:
        """Number of items that all runs have."""
        return len(self.outcomes.weights)

    def seeds(self, method: str) -> list[int]:
        return sorted(seed for name, seed in self.rows if name == method)

    def shared_seeds(self, first: str, second: str) -> list[int]:
        return sorted(set(self.seeds(first)) & set(self.seeds(second)))

    def interval(self, method: str) -> Interval:
        drawn = self.drawn[:, self._places(method, self.seeds(method))]
        if self.is_share and drawn.min() == drawn.max():
            # All items right, or all wrong: draws of them say nothing of others.
            return wilson_interval(num_correct=round(self.num_items * float(drawn[0, 0])), num_items=self.num_items)
        degrees = degrees_of_freedom(drawn, num_items=self.num_items)
        low, high = percentile_interval(draw_means(drawn), degrees=degrees)
        # Student's t knows no limits: with few seeds an interval of shares would reach beyond none and all.
        return (max(0.0, low), min(1.0, high)) if self.is_share else (low, high)

    def compare(self, first: str, second: str) -> tuple[float, Interval, float]:
        """Difference, its interval and its p-value, over the seeds that both have."""
        seeds = self.shared_seeds(first, second)
        ours, theirs = self._places(first, seeds), self._places(second, seeds)
        values = self.outcomes.values()
        drawn = self.drawn[:, ours] - self.drawn[:, theirs]
        draws, degrees = draw_means(drawn), degrees_of_freedom(drawn, num_items=self.num_items)
        gains = self.outcomes.gains
        value = float(values[ours].mean() - values[theirs].mean())
        p_value = mcnemar(gains[ours], gains[theirs]) if self.is_share else two_sided_p(value, draws, degrees=degrees)
        return value, percentile_interval(draws, degrees=degrees), p_value

    def _places(self, method: str, seeds: Iterable[int]) -> list[int]:
        return [self.rows[method, seed] for seed in seeds]


def collect_scores(methods: Sequence[Method]) -> list[Scores]:
    """Return the scores of every evaluation, accuracies first; without evaluations those of the validation loss."""
    measures = {
        Measure(name=name, metric=score.metric)
        for method in methods
        for run in method.runs
        for name, score in run.record.scores.items()
    }
    ordered = sorted(measures, key=lambda measure: (not measure.is_share, measure.name, measure.metric))
    found = [_collect(measure, methods) for measure in ordered]
    if not found:
        found = [_collect(Measure(name=VALIDATION, metric="loss"), methods)]
    return [scores for scores in found if scores.estimates]


def _collect(measure: Measure, methods: Sequence[Method]) -> Scores:
    table = _item_table(measure, methods)
    estimates = {method.name: _estimate(measure, method, table) for method in methods}
    known = {name: estimate for name, estimate in estimates.items() if estimate is not None}
    return Scores(measure=measure, estimates=known, table=table)


def _estimate(measure: Measure, method: Method, table: ItemTable | None) -> Estimate | None:
    values = [value for run in method.runs if (value := _value(measure, run)) is not None]
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if table is not None and table.seeds(method.name):
        source = "items and seeds" if len(table.seeds(method.name)) > 1 else "items"
        return Estimate(value=mean, interval=table.interval(method.name), source=source, num_runs=len(values))
    if len(values) > 1:
        return Estimate(value=mean, interval=student_interval(values), source="seeds", num_runs=len(values))
    known = next(run for run in method.runs if _value(measure, run) is not None)
    score = known.record.scores.get(measure.name)
    return Estimate(value=mean, interval=None if score is None else score.interval, source="items", num_runs=1)


def _value(measure: Measure, run: Result) -> float | None:
    if measure.name in run.record.scores:
        score = run.record.scores[measure.name]
        value = score.value if score.metric == measure.metric else None
    else:
        value = run.record.validation_loss if measure.name == VALIDATION else None
    return value if value is not None and math.isfinite(value) else None


def _item_table(measure: Measure, methods: Sequence[Method]) -> ItemTable | None:
    """Return None if runs share fewer than `LEAST_ITEMS` items, or the measure is no mean over items."""
    gains = {
        (method.name, run.record.seed): found
        for method in methods
        for run in method.runs
        if _value(measure, run) is not None and (found := _gains(measure, run))
    }
    shared = sorted(set.intersection(*map(set, gains.values()))) if gains else []
    if len(shared) < LEAST_ITEMS:
        return None
    first = next(iter(gains.values()))
    outcomes = Outcomes(
        gains=np.array([[found[index][0] for index in shared] for found in gains.values()]),
        weights=np.array([first[index][1] for index in shared]),
    )
    rows = {key: place for place, key in enumerate(gains)}
    return ItemTable(
        rows=rows,
        outcomes=outcomes,
        drawn=outcomes.draw(),
        is_share=measure.is_share,
        most_items=max(map(len, gains.values())),
    )


def _gains(measure: Measure, run: Result) -> dict[int, tuple[float, float]]:
    """Return gain and weight of each item, by its index."""
    items = run.record.items.get(measure.name, [])
    pairs = ((item.index, _gain(measure, item)) for item in items)
    return {index: gain for index, gain in pairs if gain is not None}


def _gain(measure: Measure, item: Item) -> tuple[float, float] | None:
    if measure.is_share and item.correct is not None:
        return float(item.correct), 1.0
    if measure.metric == "loss" and item.loss is not None and item.num_tokens:
        return item.loss, float(item.num_tokens)
    if measure.metric == MEAN_CHRF and item.score is not None:
        return item.score, 1.0
    return None
