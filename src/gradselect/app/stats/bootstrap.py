"""Means with intervals and differences of all methods at once, over items and seeds.

The draws are made once and shared by all methods: what is compared has met the same items and seeds, and a table of 25
methods costs no more than a table of two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .tests import mcnemar_exact

NUM_DRAWS = 4000
DRAWS_AT_ONCE = 500
"""Draws in memory together: 500 x 1319 items are 5 MB."""

STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantile 0.975 of Student's t with 1, 2, ... degrees of freedom."""

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Several runs' outcomes on the same items. A run's value is `gains.sum() / weights.sum()`.

    Args:
        gains: shape (runs, items); 1 for a right answer, or an item's summed loss.
        weights: shape (items,); 1, or an item's tokens.
    """

    gains: np.ndarray  # (9, 1319)
    weights: np.ndarray  # (1319,)

    def values(self) -> np.ndarray:  # (runs,)
        """The value of each run."""
        return self.gains.sum(1) / self.weights.sum()

    def draw(self, *, num_draws: int = NUM_DRAWS, seed: int = 0) -> np.ndarray:  # (num_draws, runs)
        """Values of the runs on items drawn with replacement, in each draw the same items for all runs."""
        generator = np.random.default_rng(seed)
        num_items = len(self.weights)
        shares = np.full(num_items, 1 / num_items)
        drawn = []
        for done in range(0, num_draws, DRAWS_AT_ONCE):
            counts = generator.multinomial(num_items, shares, size=min(DRAWS_AT_ONCE, num_draws - done))
            drawn.append(counts @ self.gains.T / (counts @ self.weights)[:, None])
        return np.concatenate(drawn)


def draw_means(drawn: np.ndarray, *, seed: int = 1) -> np.ndarray:
    """Means over seeds that are drawn too: n - 1 of n with replacement, which keeps the variance of a mean unbiased.

    A single seed is taken as it is: its spread is that of the items alone.

    References: J. N. K. Rao, C. F. J. Wu, "Resampling inference with complex survey data", JASA 83 (1988), for n - 1;
    A. B. Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1 (2007), for items and seeds at once.

    Args:
        drawn: shape (draws, seeds), e.g. (4000, 3).

    Returns:
        Shape (draws,).
    """
    num_draws, num_seeds = drawn.shape
    if num_seeds == 1:
        return drawn[:, 0]
    # The same seeds for every method, as the generator starts the same.
    places = np.random.default_rng(seed).integers(num_seeds, size=(num_draws, num_seeds - 1))
    return np.take_along_axis(drawn, places, axis=1).mean(1)


def percentile_interval(draws: np.ndarray) -> Interval:
    """The middle 95 % of the draws."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def two_sided_p(value: float, draws: np.ndarray) -> float:
    """P-value of "no difference": the value in standard errors of the bootstrap, taken as normal.

    Not the share of draws beyond zero: with hundreds of pairs its smallest value would fail every adjusted test.
    """
    error = float(draws.std(ddof=1))
    return math.erfc(abs(value) / error / math.sqrt(2)) if error > 0 else float(value == 0)


def student_interval(values: Sequence[float]) -> Interval | None:
    """95 % interval of a mean over seeds, for what has no items; None for a single seed."""
    num = len(values)
    if num < 2:
        return None
    mean = math.fsum(values) / num
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (num - 1) / num)
    width = (STUDENT_95[num - 2] if num - 2 < len(STUDENT_95) else 2.0) * error
    return mean - width, mean + width


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p-value of "both are right equally often" on the same items, asked once with each of n seeds.

    One seed: the exact test. Several: an item's answers hang together, so the item is the unit. With d_i = right
    answers of the first on item i minus those of the second, over seeds:

        (sum_i d_i)² / sum_i d_i²  ~  chi² with one degree of freedom,

    which is McNemar's statistic for one seed.

    Reference: V. L. Durkalski, Y. Y. Palesch, S. R. Lipsitz, P. F. Rust, "Analysis of clustered matched-pair data",
    Statistics in Medicine 22 (2003).

    Args:
        first: shape (seeds, items), 1 for a right answer.
        second: the same of the other.
    """
    assert first.shape == second.shape
    differences = (first - second).sum(0)
    if len(first) == 1:
        return mcnemar_exact(only_first=int((differences > 0).sum()), only_second=int((differences < 0).sum()))
    squares = float((differences**2).sum())
    return 1.0 if squares == 0 else math.erfc(math.sqrt(float(differences.sum()) ** 2 / squares / 2))
