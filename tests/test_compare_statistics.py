"""Statistics of a comparison against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradselect.app.stats.intervals import mean_and_deviation
from gradselect.app.stats.paired_tests import holm_adjusted, mcnemar_exact


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_sum_of_binomial_probabilities(b: int, c: int) -> None:
    rarer = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
    assert mcnemar_exact(only_first=b, only_second=c) == pytest.approx(min(1.0, 2 * rarer / 2 ** (b + c)), rel=1e-12)


def test_mcnemar_holds_for_thousands_of_items() -> None:
    rarer = sum(math.comb(4300, i) for i in range(2001))
    assert mcnemar_exact(only_first=2000, only_second=2300) == pytest.approx(2 * rarer / 2**4300, rel=1e-9)


def test_holm_multiplies_the_smallest_by_the_number_of_tests() -> None:
    assert holm_adjusted([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm_adjusted([0.9, 0.8]) == [1.0, 1.0]
    assert holm_adjusted([]) == []


def test_one_seed_has_no_deviation() -> None:
    assert mean_and_deviation([0.4]) == (0.4, None)
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(np.std([1, 3], ddof=1)))
