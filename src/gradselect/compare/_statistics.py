"""Is one method better than another: exact tests on paired answers, bootstrap over items and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS_AT_ONCE = 500
"""Draws of the bootstrap that are in memory together: 500 x 1319 items are 5 MB."""


@dataclass(frozen=True, kw_only=True)
class PairedAnswers:
    """Two models' answers to the same items, counted.

    Args:
        both: items that both got right.
        only_first: items that the first alone got right.
        only_second: items that the second alone got right.
        neither: the other items.
    """

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def p_value(self) -> float:
        """Of the exact McNemar test."""
        return mcnemar_exact(only_first=self.only_first, only_second=self.only_second)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """First method minus second.

    Args:
        value: the difference of the means.
        interval: 95 % percentile interval of the bootstrap.
        p_value: two-sided: twice the share of draws on the rarer side of zero, at most 1.
    """

    value: float
    interval: tuple[float, float]
    p_value: float


def paired_answers(first: Sequence[bool], second: Sequence[bool]) -> PairedAnswers:
    """Count what two models got right of the same items, in the same order."""
    pairs = list(zip(map(bool, first), map(bool, second), strict=True))
    return PairedAnswers(
        both=pairs.count((True, True)),
        only_first=pairs.count((True, False)),
        only_second=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )


def mcnemar_exact(*, only_first: int, only_second: int) -> float:
    """Two-sided p-value of "both models are right equally often", from the items on which they differ.

    Given n = b + c items that exactly one model got right, b is Binomial(n, 1/2):

        p = min(1, 2 sum_{i <= min(b, c)} C(n, i) / 2^n)

    Reference: Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12 (1947); its exact form is the sign test.

    Args:
        only_first: items that the first model alone got right, b.
        only_second: items that the second alone got right, c.
    """
    assert only_first >= 0
    assert only_second >= 0
    n, rarer = only_first + only_second, min(only_first, only_second)
    # Whole numbers: C(n, i) and 2^n exceed a float from a thousand items on.
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(rarer + 1)) / 2**n)


def bootstrap_difference(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    *,
    weights: Sequence[float] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> Difference:
    """The difference of two methods' means over runs and items, with the uncertainty of both.

        d = sum_i w_i (mean_s x_si - mean_s y_si) / sum_i w_i

    Each draw takes items with replacement, the same for both methods (they answered the same items), and takes runs
    with replacement, for each method by itself. With few seeds the spread over seeds comes out too small, by the factor
    (n - 1) / n in variance: read intervals from three seeds as lower bounds of their width.

    Reference: B. Efron, R. Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 8 and 13; rows and columns
    drawn at the same time: A. B. Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1 (2007).

    Args:
        first: one row a seed, one value an item, e.g. 1.0 for a right answer.
        second: the same of the other method; items in the same order, as many seeds as there are.
        weights: of the items, e.g. target tokens of a loss; by default all alike.
        draws: how often to draw.
        seed: of the draws.
    """
    ours, theirs = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    assert ours.ndim == theirs.ndim == 2
    assert ours.shape[1] == theirs.shape[1]
    weight = np.ones(ours.shape[1]) if weights is None else np.asarray(weights, dtype=float)
    generator = np.random.default_rng(seed)
    sizes = [min(DRAWS_AT_ONCE, draws - done) for done in range(0, draws, DRAWS_AT_ONCE)]
    drawn = np.concatenate([_draw_differences(ours, theirs, weight, size, generator) for size in sizes])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Difference(
        value=float((ours.mean(0) - theirs.mean(0)) @ weight / weight.sum()),
        interval=(float(low), float(high)),
        p_value=min(1.0, 2 * min(float((drawn <= 0).mean()), float((drawn >= 0).mean()))),
    )


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """P-values that may be compared with one level although several differences were tested.

        p'_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))        p_(1) <= ... <= p_(m)

    Reference: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6
    (1979).
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (divisor n - 1) over seeds; one value has no deviation."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _draw_differences(
    ours: np.ndarray,  # (3, 1319): seeds, items
    theirs: np.ndarray,  # (2, 1319)
    weight: np.ndarray,  # (1319,)
    size: int,
    generator: np.random.Generator,
) -> np.ndarray:  # (size,)
    """`size` draws of the difference."""
    # How often an item or a run is drawn is multinomial: counts instead of indices.
    items = _draw_counts(len(weight), size, generator) * weight
    means = _draw_counts(len(ours), size, generator) @ ours / len(ours)
    means -= _draw_counts(len(theirs), size, generator) @ theirs / len(theirs)
    return (items * means).sum(1) / items.sum(1)


def _draw_counts(num: int, size: int, generator: np.random.Generator) -> np.ndarray:  # (size, num)
    return generator.multinomial(num, np.full(num, 1 / num), size=size)
