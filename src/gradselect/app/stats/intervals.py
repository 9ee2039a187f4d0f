"""Means with their 95 % confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import stats

Interval = tuple[float, float]
"""Lower and upper limit."""

LEVEL = 0.95
LOWEST, HIGHEST = 0.025, 0.975
"""Quantiles at the limits of the interval."""


def wilson_interval(*, num_correct: int, num_items: int) -> Interval:
    """95 % interval of a share, by the score method. Unlike the normal one it also holds near 0 and 1.

    Reference: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    low, high = stats.binomtest(num_correct, num_items).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


def mean_loss(losses: Sequence[float], num_tokens: Sequence[int]) -> float:
    """Nats per token over all items: sum of the items' summed losses / sum of their tokens."""
    return math.fsum(losses) / sum(num_tokens)


def mean_loss_interval(losses: Sequence[float], num_tokens: Sequence[int]) -> Interval | None:
    """95 % interval of `mean_loss` when items, not tokens, are independent; None for a single item.

    A ratio R = sum L_i / sum t_i of item totals has the linearised variance n/(n-1) sum (L_i - R t_i)² / (sum t_i)².
    Student's t with n - 1 degrees of freedom is right for items of one length and close for others.

    Reference: W. G. Cochran, "Sampling Techniques", 3rd edition (1977), equation 6.13.
    """
    n = len(losses)
    if n < 2:
        return None
    ratio = mean_loss(losses, num_tokens)
    squares = math.fsum((loss - ratio * tokens) ** 2 for loss, tokens in zip(losses, num_tokens, strict=True))
    error = math.sqrt(n / (n - 1) * squares) / sum(num_tokens)
    width = float(stats.t.ppf(HIGHEST, df=n - 1)) * error
    return ratio - width, ratio + width


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (divisor n - 1) over seeds; one value has no deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def student_interval(values: Sequence[float]) -> Interval | None:
    """95 % interval of a mean over seeds, by Student's t, for scores without items; None for a single seed."""
    mean, deviation = mean_and_deviation(values)
    if deviation is None:
        return None
    width = float(stats.t.ppf(HIGHEST, df=len(values) - 1)) * deviation / math.sqrt(len(values))
    return mean - width, mean + width


def percentile_interval(draws: np.ndarray, *, degrees: float = math.inf) -> Interval:
    """Middle 95 % of the draws of a bootstrap, wider by Student's t over the normal quantile.

    Args:
        draws: of the bootstrap.
        degrees: degrees of freedom of their variance; few if it comes from few seeds.
    """
    low, high = np.quantile(draws, (LOWEST, HIGHEST))
    middle, wider = float(draws.mean()), float(stats.t.ppf(HIGHEST, degrees) / stats.norm.ppf(HIGHEST))
    return middle + wider * (float(low) - middle), middle + wider * (float(high) - middle)
