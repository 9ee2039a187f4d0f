"""What tables of a comparison say of several runs; the bootstrap over items and seeds is the report's."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
