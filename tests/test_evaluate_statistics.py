"""Confidence intervals against their definitions, numpy and simulation."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradselect.app.stats.intervals import mean_loss, mean_loss_interval, wilson_interval


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_share_interval_is_wilsons(counts: tuple[int, int]) -> None:
    """Its limits are the shares p with |share - p| = z sqrt(p (1 - p) / n)."""
    num_correct, num_items = counts
    low, high = wilson_interval(num_correct=num_correct, num_items=num_items)
    share = num_correct / num_items
    assert 0 <= low <= share <= high <= 1
    for limit in (low, high):
        distance = 1.959963984540054 * (limit * (1 - limit) / num_items) ** 0.5
        assert abs(share - limit) == pytest.approx(distance, abs=1e-9)


def test_for_items_of_one_length_the_loss_interval_is_that_of_a_mean() -> None:
    losses = numpy.random.default_rng(0).gamma(2.0, size=50)
    low, high = mean_loss_interval((10 * losses).tolist(), [10] * 50) or (0.0, 0.0)
    error = 2.009575237129235 * losses.std(ddof=1) / 50**0.5  # quantile of Student's t with 49 degrees of freedom
    assert (low, high) == pytest.approx((losses.mean() - error, losses.mean() + error))


def test_the_loss_interval_holds_the_true_value_as_often_as_it_says() -> None:
    """Long items have larger losses here: an interval that took tokens for independent would hold it far less often."""
    generator = numpy.random.default_rng(0)
    held, trials = 0, 1000
    for _ in range(trials):
        lengths = generator.integers(5, 100, size=80)
        means = generator.gamma(4.0, 0.5, size=80) * (1 + lengths / 100)
        low, high = mean_loss_interval((means * lengths).tolist(), lengths.tolist()) or (0.0, 0.0)
        sizes = numpy.arange(5, 100)
        held += low < 2 * (sizes * (1 + sizes / 100)).mean() / sizes.mean() < high
    assert 0.92 < held / trials < 0.97


def test_the_loss_interval_of_five_items_holds_the_true_value_as_often_as_it_says() -> None:
    """The quantile of a normal distribution would hold it 88 times of 100."""
    draws = numpy.random.default_rng(0).normal(2.0, 0.5, size=(2000, 5))
    intervals = [mean_loss_interval((10 * losses).tolist(), [10] * 5) or (0.0, 0.0) for losses in draws]
    assert 0.935 < numpy.mean([low < 2.0 < high for low, high in intervals]) < 0.965


def test_tokens_weigh_alike_whatever_item_they_are_in() -> None:
    assert mean_loss([1.0, 90.0], [1, 9]) == pytest.approx(9.1)


def test_one_item_has_no_interval() -> None:
    assert mean_loss_interval([3.0], [2]) is None
