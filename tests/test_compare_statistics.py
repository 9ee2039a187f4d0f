"""Statistics of a comparison, against scipy and against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gradselect.compare._statistics import (
    bootstrap_difference,
    holm_adjusted,
    mcnemar_exact,
    mean_and_deviation,
    paired_answers,
)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_two_sided_binomial_test(b: int, c: int) -> None:
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar_exact(only_first=b, only_second=c) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_holds_for_thousands_of_items() -> None:
    expected = stats.binomtest(2000, 4300, 0.5).pvalue
    assert mcnemar_exact(only_first=2000, only_second=2300) == pytest.approx(expected, rel=1e-6)


def test_paired_answers_are_counted() -> None:
    counted = paired_answers([True, True, False, False, True], [True, False, True, False, False])
    assert (counted.both, counted.only_first, counted.only_second, counted.neither) == (1, 2, 1, 1)
    assert counted.p_value == mcnemar_exact(only_first=2, only_second=1)


def test_answers_to_different_items_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_answers([True], [True, False])


def test_one_seed_each_is_the_paired_bootstrap_of_scipy() -> None:
    """The limits of two independent sets of 10,000 draws agree to some hundredths of a standard error."""
    generator = np.random.default_rng(3)
    ours, theirs = generator.random(80), generator.random(80)
    found = bootstrap_difference([ours], [theirs])
    expected = stats.bootstrap((ours - theirs,), np.mean, n_resamples=10_000, method="percentile", rng=7)
    error = expected.standard_error
    assert found.value == pytest.approx(np.mean(ours - theirs))
    assert found.interval[0] == pytest.approx(expected.confidence_interval.low, abs=0.1 * error)
    assert found.interval[1] == pytest.approx(expected.confidence_interval.high, abs=0.1 * error)


def test_spread_over_seeds_widens_the_interval() -> None:
    """Two seeds at 0.2 and 0.8 against one at 0.5: items tell nothing apart, seeds do."""
    ours, theirs = [[0.2] * 50, [0.8] * 50], [[0.5] * 50]
    assert bootstrap_difference(ours, theirs).interval == pytest.approx((-0.3, 0.3))
    assert bootstrap_difference([[0.5] * 50], theirs).interval == (0.0, 0.0)


def test_items_are_paired() -> None:
    """A model that is better by the same amount on every item is better for certain, however items differ."""
    items = np.random.default_rng(0).random(40)
    found = bootstrap_difference([items + 0.01], [items])
    assert found.interval == pytest.approx((0.01, 0.01))
    assert found.p_value == 0.0


def test_weights_make_it_a_mean_over_tokens() -> None:
    found = bootstrap_difference([[1.0, 3.0]], [[0.0, 0.0]], weights=[3, 1])
    assert found.value == pytest.approx(1.5)
    # Every draw is one of (1, 1), (1, 3), (3, 3).
    assert found.interval == pytest.approx((1.0, 3.0))


def test_no_difference_is_not_significant() -> None:
    assert bootstrap_difference([[1.0, 0.0]], [[1.0, 0.0]]).p_value == 1.0


def test_bootstrap_repeats_itself() -> None:
    rows = [[1.0, 0.0, 1.0, 1.0]], [[0.0, 0.0, 1.0, 0.0]]
    assert bootstrap_difference(*rows) == bootstrap_difference(*rows)


def test_holm_multiplies_the_smallest_by_the_number_of_tests() -> None:
    assert holm_adjusted([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm_adjusted([0.9, 0.8]) == [1.0, 1.0]
    assert holm_adjusted([]) == []


def test_one_seed_has_no_deviation() -> None:
    assert mean_and_deviation([0.4]) == (0.4, None)
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(np.std([1, 3], ddof=1)))
