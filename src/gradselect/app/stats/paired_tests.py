"""Tests of "no difference" between two methods, and the correction for several of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided p-value of "both are right equally often", on the same items with the same seeds.

    With one seed this is the exact test. With several seeds the answers to one item are correlated, so items are the
    independent observations. With d_i = right answers of the first to item i minus those of the second, over seeds:

        (sum_i d_i)² / sum_i d_i²  ~  chi² with one degree of freedom,

    which is McNemar's statistic for one seed.

    Reference: V. L. Durkalski, Y. Y. Palesch, S. R. Lipsitz, P. F. Rust, "Analysis of clustered matched-pair data",
    Statistics in Medicine 22 (2003).

    Args:
        first: shape (seeds, items), 1 for a right answer.
        second: the same for the other method.
    """
    assert first.shape == second.shape
    differences = (first - second).sum(0)
    if len(first) == 1:
        return mcnemar_exact(only_first=int((differences > 0).sum()), only_second=int((differences < 0).sum()))
    squares = float((differences**2).sum())
    return 1.0 if squares == 0 else float(stats.chi2.sf(float(differences.sum()) ** 2 / squares, df=1))


def mcnemar_exact(*, only_first: int, only_second: int) -> float:
    """Two-sided p-value of "both models are right equally often", from the items on which they differ.

    Given n = b + c items that exactly one model got right, b is Binomial(n, 1/2).

    Reference: Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12 (1947); its exact form is the sign test.

    Args:
        only_first: number of items that only the first model got right, b.
        only_second: number of items that only the second model got right, c.
    """
    num_differing = only_first + only_second
    return float(stats.binomtest(only_first, num_differing).pvalue) if num_differing else 1.0


def two_sided_p(value: float, draws: np.ndarray, *, degrees: float = np.inf) -> float:
    """P-value of "no difference": the value in standard errors of the bootstrap, by Student's t.

    Not the share of draws beyond zero: with hundreds of pairs its smallest value would fail every adjusted test.
    """
    error = float(draws.std(ddof=1))
    return float(2 * stats.t.sf(abs(value) / error, degrees)) if error > 0 else float(value == 0)


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """P-values that stay valid although several differences were tested.

        p'_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))        p_(1) <= ... <= p_(m)

    Reference: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6
    (1979).
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted
