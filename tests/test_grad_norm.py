"""Properties of GradNormTopK only; those of every policy are in test_policy_contract.py."""

import math
from collections import Counter

import numpy as np
import pytest
from policy_support import BLOCK_NAMES, make_blocks, norms_at, take_step
from scipy import stats

from gradselect import UsageError
from gradselect.policies import GradNormTopK

FOUR = BLOCK_NAMES[:4]
NORMS = dict(zip(FOUR, (0.5, 2.0, 1.0, 1.5), strict=True))
NOISE_LEVEL = 1e-4
"""Seeds are fixed, so a test passes or fails for good; under this p-value the law itself is what is wrong."""


def bound(names: tuple[str, ...] = FOUR, **options: object) -> GradNormTopK:
    return GradNormTopK(**options).bind(make_blocks(names))  # type: ignore[arg-type]


def finite_norms(step: int) -> dict[str, float]:
    return {name: norm if math.isfinite(norm) else 1.0 for name, norm in norms_at(step).items()}


def test_algorithm_1_looks_at_every_step_and_takes_the_largest_norms() -> None:
    policy = bound(BLOCK_NAMES, count=3)
    for step in range(40):
        norms = finite_norms(step)
        assert policy.propose(step) is None
        assert set(take_step(policy, step, norms)) == set(sorted(norms, key=lambda name: norms[name])[-3:])


def test_a_norm_that_is_not_finite_ranks_last_and_is_not_averaged() -> None:
    policy = bound(count=2, ema=0.5)
    take_step(policy, 0, NORMS)
    assert take_step(policy, 1, NORMS | {FOUR[1]: math.inf, FOUR[3]: math.nan}) == (FOUR[0], FOUR[2])
    assert policy.averages == NORMS


def test_rms_divides_by_the_root_of_the_number_of_weights() -> None:
    assert bound(count=1, norm="rms").decide(0, dict.fromkeys(FOUR, 1.0)) == (FOUR[0],)
    policy = bound(count=1, norm="rms")
    take_step(policy, 0, {name: float(size) for size, name in enumerate(FOUR, start=1)})
    assert policy.averages == dict.fromkeys(FOUR, 1.0)


def test_refresh_looks_every_so_many_steps_and_keeps_the_choice_between() -> None:
    policy = bound(BLOCK_NAMES, count=2, refresh=5)
    looks, selections = [], []
    for step in range(40):
        looks += [step] if policy.propose(step) is None else []
        selections.append(take_step(policy, step, finite_norms(step)))
    assert looks == list(range(0, 40, 5))
    assert all(selections[step] == selections[step - step % 5] for step in range(40))
    assert len(set(selections)) > 3


@pytest.mark.parametrize("probe_steps", [0, 4])
def test_without_a_period_the_first_selection_stays(probe_steps: int) -> None:
    policy = bound(BLOCK_NAMES, count=2, refresh=None, probe_steps=probe_steps)
    looks, selections = [], []
    for step in range(40):
        looks += [step] if policy.propose(step) is None else []
        selections.append(take_step(policy, step, finite_norms(step)))
    mean = {name: sum(finite_norms(step)[name] for step in range(probe_steps or 1)) for name in BLOCK_NAMES}
    largest = sorted(mean, key=mean.__getitem__)[-2:]
    assert looks == list(range(probe_steps or 1))
    assert policy.expected_explore_steps(40) == len(looks)
    assert set(selections[probe_steps:]) == {tuple(name for name in BLOCK_NAMES if name in largest)}


@pytest.mark.parametrize("nothing", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("refresh", [None, 5])
def test_a_selection_by_gradients_that_are_all_zero_or_not_finite_is_made_again(
    refresh: int | None, nothing: float
) -> None:
    policy = bound(count=1, refresh=refresh)
    looks = []
    for step in range(5):
        looks += [step] if policy.propose(step) is None else []
        selected = take_step(policy, step, dict.fromkeys(FOUR, nothing) if step < 2 else NORMS)
    assert looks == [0, 1, 2]
    assert selected == (max(NORMS, key=NORMS.__getitem__),)


def test_a_zero_gradient_leaves_a_selection_by_older_norms_alone() -> None:
    policy = bound(count=1, refresh=5, ema=0.5)
    take_step(policy, 0, NORMS)
    for step in range(1, 5):
        assert policy.propose(step) is not None
        take_step(policy, step, dict.fromkeys(FOUR, 0.0))


def test_a_selection_by_gradients_that_are_not_finite_does_not_stay_though_older_norms_are_known() -> None:
    policy = bound(count=1, refresh=5, ema=0.5)
    for step in range(5):
        take_step(policy, step, NORMS)
    take_step(policy, 5, dict.fromkeys(FOUR, math.nan))
    assert policy.propose(6) is None
    assert take_step(policy, 6, NORMS) == (max(NORMS, key=NORMS.__getitem__),)


def test_the_average_starts_at_the_first_norm_and_follows_the_formula() -> None:
    policy = bound(BLOCK_NAMES, count=2, ema=0.75)
    expected = finite_norms(0)
    for step in range(20):
        norms = finite_norms(step)
        expected = {name: 0.75 * expected[name] + 0.25 * norms[name] for name in BLOCK_NAMES}
        selected = take_step(policy, step, norms)
        assert policy.averages == pytest.approx(expected)
        assert set(selected) == set(sorted(expected, key=lambda name: expected[name])[-2:])


def softmax_draws(num_draws: int, count: int, temperature: float) -> Counter[tuple[str, ...]]:
    """Draws without replacement by numpy, from an explicit softmax."""
    weights = np.exp(np.array(list(NORMS.values())) / temperature)
    generator = np.random.default_rng(2)
    draws = (generator.choice(4, count, replace=False, p=weights / weights.sum()) for _ in range(num_draws))
    return Counter(tuple(FOUR[position] for position in sorted(draw)) for draw in draws)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("probe_steps", [0, 1], ids=["in a decision", "in a proposal"])
def test_temperature_draws_without_replacement_from_the_softmax(count: int, probe_steps: int) -> None:
    drawn: Counter[tuple[str, ...]] = Counter()
    for seed in range(3000):
        policy = bound(count=count, temperature=0.7, probe_steps=probe_steps, seed=seed)
        drawn[[take_step(policy, step, NORMS) for step in range(probe_steps + 1)][-1]] += 1
    expected = softmax_draws(20_000, count, 0.7)
    keys = sorted(drawn.keys() | expected.keys())
    table = [[drawn[key] for key in keys], [expected[key] for key in keys]]
    assert stats.chi2_contingency(table).pvalue > NOISE_LEVEL


def test_a_temperature_by_the_spread_is_the_standard_deviation_on_any_scale() -> None:
    """The number that was the default of GRASS drew almost evenly on a model of everyday size."""
    norms = np.array(list(NORMS.values()))
    for scale in (1.0, 1e-4):
        drawn: Counter[tuple[str, ...]] = Counter()
        for seed in range(4000):
            policy = bound(count=1, temperature="spread", probe_steps=1, seed=seed)
            take_step(policy, 0, {name: scale * norm for name, norm in NORMS.items()})
            drawn[take_step(policy, 1, NORMS)] += 1
        weights = np.exp(norms / norms.std())
        expected = 4000 * weights / weights.sum()
        assert float(stats.chisquare([drawn[name,] for name in FOUR], expected).pvalue) > NOISE_LEVEL


def test_blocks_that_are_all_alike_have_no_spread_and_are_drawn_evenly() -> None:
    policy = bound(BLOCK_NAMES, count=1, temperature="spread", probe_steps=1, refresh=1)
    take_step(policy, 0, dict.fromkeys(BLOCK_NAMES, 1.0))
    assert {take_step(policy, step, dict.fromkeys(BLOCK_NAMES, 1.0)) for step in range(1, 80)} == {
        (name,) for name in BLOCK_NAMES
    }


def test_a_spread_needs_steps_that_look() -> None:
    with pytest.raises(UsageError, match=r'temperature="spread" with probe_steps=0: .* write probe_steps=20'):
        GradNormTopK(count=1, temperature="spread")
    with pytest.raises(UsageError, match="temperature='wide'"):
        GradNormTopK(count=1, temperature="wide", probe_steps=1)  # type: ignore[arg-type]


def test_a_small_temperature_is_top_k() -> None:
    assert {bound(count=2, temperature=1e-9, seed=seed).decide(0, NORMS) for seed in range(50)} == {(FOUR[1], FOUR[3])}


def test_probing_only_looks_and_afterwards_nothing_but_the_selected_is_observed() -> None:
    policy = bound(BLOCK_NAMES, count=2, refresh=3, temperature=1.0, ema=0.9, probe_steps=5)
    for step in range(30):
        probing = step < 5
        assert (policy.propose(step) is None) == probing
        assert policy.observes_selected(step) == (not probing)
        assert len(take_step(policy, step, finite_norms(step))) == (0 if probing else 2)


def test_without_probing_no_norm_is_wanted_beside_the_decisions() -> None:
    policy = bound(count=2, refresh=3, ema=0.9)
    assert not any(policy.observes_selected(step) for step in range(20))


def test_after_probing_the_average_is_the_mean_of_the_norms() -> None:
    policy = bound(BLOCK_NAMES, count=2, ema=0.9, probe_steps=7)
    for step in range(7):
        take_step(policy, step, finite_norms(step))
    means = {name: sum(finite_norms(step)[name] for step in range(7)) / 7 for name in BLOCK_NAMES}
    assert policy.averages == pytest.approx(means)


def test_frozen_blocks_keep_their_average_and_selected_ones_follow_their_norm() -> None:
    policy = bound(BLOCK_NAMES, count=2, refresh=2, temperature=1.0, ema=0.9, probe_steps=4)
    for step in range(4):
        take_step(policy, step, finite_norms(step))
    for step in range(4, 30):
        before, norms = dict(policy.averages), finite_norms(step)
        selected = take_step(policy, step, norms)
        moved = {name: 0.9 * before[name] + 0.1 * norms[name] for name in selected}
        assert policy.averages == pytest.approx(before | moved)


def test_after_probing_the_choice_is_renewed_every_refresh_steps() -> None:
    policy = bound(BLOCK_NAMES, count=2, refresh=4, temperature=10.0, probe_steps=3)
    selections = [take_step(policy, step, finite_norms(step)) for step in range(43)][3:]
    assert all(selections[step] == selections[step - step % 4] for step in range(40))
    assert len(set(selections)) > 4
