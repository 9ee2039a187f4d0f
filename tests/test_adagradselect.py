"""Properties of AdaGradSelect only; those of every policy are in test_policy_contract.py."""

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_support import BLOCK_NAMES, make_blocks, norms_at, take_step
from scipy import stats
from torch import nn

import gradselect as gs
from gradselect import BlockOptimizer, GradNormTopK, Uniform, UsageError, partition
from gradselect.blocks.draws import gumbel, log_gamma, open_uniform, random_stream
from gradselect.blocks.policy import largest
from gradselect.policies import AdaGradSelect
from gradselect.policies.adagradselect import due

FOUR = BLOCK_NAMES[:4]
NOISE_LEVEL = 1e-4
"""Seeds are fixed, so a test passes or fails for good; under this p-value the law itself is what is wrong."""


def bound(names: tuple[str, ...] = FOUR, counts: Mapping[str, float] | None = None, **options: object) -> AdaGradSelect:
    policy = AdaGradSelect(**{"explore_steps": 1, "among": None} | options).bind(make_blocks(names))  # type: ignore[arg-type]
    if counts is not None:
        policy.load_state(policy.state() | {"counts": dict(counts)})
    return policy


def exploit_draws(num_draws: int, **options: object) -> Counter[tuple[str, ...]]:
    """Return the selections of the same exploit step under many seeds."""
    proposals = (bound(**options, seed=seed).propose(5) for seed in range(num_draws))  # type: ignore[arg-type]
    return Counter(proposal for proposal in proposals if proposal is not None)


def p_value(drawn: Counter[tuple[str, ...]], expected: Counter[tuple[str, ...]]) -> float:
    """Chi-square test that two samples of selections have the same distribution."""
    keys = sorted(drawn.keys() | expected.keys())
    return float(stats.chi2_contingency([[drawn[key] for key in keys], [expected[key] for key in keys]]).pvalue)


# --- exploring ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_the_first_step_explores_and_none_after_explore_steps(every: int) -> None:
    for seed in range(200):
        policy = bound(explore_steps=6, every=every, seed=seed)
        assert policy.propose(0) is None
        assert all(policy.propose(step) is not None for step in range(6, 60))


def test_the_explore_share_follows_the_formula_at_every_step() -> None:
    num_steps, num_seeds, epsilon_end = 40, 1500, 0.05
    policies = [bound(explore_steps=num_steps, epsilon_end=epsilon_end, seed=seed) for seed in range(num_seeds)]
    for step in (1, 5, 10, 20, 39):
        epsilon = math.exp(-math.log(1 / epsilon_end) / num_steps * step)
        num_explored = sum(policy.propose(step) is None for policy in policies)
        assert stats.binomtest(num_explored, num_seeds, epsilon).pvalue > NOISE_LEVEL
        assert policies[0].explore_probability(step) == pytest.approx(epsilon)


def test_the_explore_share_within_one_run_follows_the_formula() -> None:
    """Steps of one seed are as independent as seeds of one step."""
    policy = bound(explore_steps=4000)
    probabilities = [0.01 ** (step / 4000) for step in range(4000)]
    num_explored = sum(policy.propose(step) is None for step in range(4000))
    deviation = math.sqrt(sum(p * (1 - p) for p in probabilities))
    assert abs(num_explored - sum(probabilities)) < 4 * deviation


def test_epsilon_end_of_one_explores_until_the_last_step() -> None:
    policy = bound(explore_steps=50, epsilon_end=1.0)
    assert [policy.propose(step) is None for step in range(60)] == [True] * 50 + [False] * 10


def test_cumulative_ranks_by_the_sum_of_norms_and_step_by_the_last() -> None:
    early, late = dict(zip(FOUR, (9.0, 1.0, 1.0, 5.0), strict=True)), dict(zip(FOUR, (1.0, 2.0, 6.0, 3.0), strict=True))
    for rank_by, expected in (("cumulative", (FOUR[0], FOUR[3])), ("step", (FOUR[2], FOUR[3]))):
        policy = bound(count=2, explore_steps=9, epsilon_end=1.0, rank_by=rank_by)
        assert take_step(policy, 0, early) == (FOUR[0], FOUR[3])
        assert take_step(policy, 1, late) == expected
        assert policy.scores == {name: early[name] + late[name] for name in FOUR}


def test_rms_divides_by_the_root_of_the_number_of_weights() -> None:
    """Blocks of 1, 4, 9, 16 weights: equal norms rank the smallest first, norms in proportion to the root tie."""
    policy = bound(count=1, norm="rms", rank_by="step")
    assert policy.decide(0, dict.fromkeys(FOUR, 1.0)) == (FOUR[0],)
    assert [policy.score(0, name, float(size)) for size, name in enumerate(FOUR, start=1)] == [1.0] * 4
    assert bound(count=1, norm="l2").decide(0, {name: float(size) for size, name in enumerate(FOUR)}) == (FOUR[3],)


def test_a_norm_that_is_not_finite_is_no_information_and_ranks_last() -> None:
    policy = bound(count=3, explore_steps=9, epsilon_end=1.0)
    assert take_step(policy, 0, dict(zip(FOUR, (5.0, 1.0, 2.0, 3.0), strict=True))) == (FOUR[0], FOUR[2], FOUR[3])
    broken = dict(zip(FOUR, (math.nan, 0.1, math.inf, 0.1), strict=True))
    assert {FOUR[1], FOUR[3]} < set(take_step(policy, 1, broken))
    assert policy.scores == pytest.approx(dict(zip(FOUR, (5.0, 1.1, 2.0, 3.1), strict=True)))


# --- exploiting -----------------------------------------------------------------------------------------

COUNTS = dict(zip(FOUR, (0.0, 1.0, 3.0, 8.0), strict=True))


@pytest.mark.parametrize("delta", [0.3, 1.0])
@pytest.mark.parametrize("draw", ["top-k", "multinomial"])
def test_exploit_draws_follow_the_dirichlet_law(draw: str, delta: float) -> None:
    """Against numpy: Dirichlet probabilities, then its argsort or its choice without replacement."""
    generator = np.random.default_rng(1)
    expected: Counter[tuple[str, ...]] = Counter()
    for shares in generator.dirichlet([count + delta for count in COUNTS.values()], size=20_000):
        top = np.argsort(shares)[-2:] if draw == "top-k" else generator.choice(4, size=2, replace=False, p=shares)
        expected[tuple(FOUR[position] for position in sorted(top))] += 1
    drawn = exploit_draws(4000, count=2, counts=COUNTS, delta=delta, draw=draw)
    assert p_value(drawn, expected) > NOISE_LEVEL


@pytest.mark.parametrize("draw", ["top-k", "multinomial"])
def test_exploit_draws_do_not_depend_on_why_the_step_exploits(draw: str) -> None:
    """Among exploring steps, too: the draw must not reuse the random number that decided against exploring."""
    even = dict.fromkeys(FOUR, 3.0)
    drawn = exploit_draws(6000, count=1, counts=even, draw=draw, explore_steps=30)
    assert 2500 < drawn.total() < 4000
    assert stats.chisquare([drawn[(name,)] for name in FOUR]).pvalue > NOISE_LEVEL


def test_the_two_draws_are_two_laws() -> None:
    """Otherwise the test above could not tell them apart."""
    draws = [exploit_draws(4000, count=2, counts=COUNTS, draw=draw) for draw in ("top-k", "multinomial")]
    assert p_value(*draws) < NOISE_LEVEL


def test_one_multinomial_draw_has_the_mean_of_the_dirichlet() -> None:
    """E[p_b] = (f_b + delta) / sum(f + delta): exact, for non-integer counts too."""
    counts = dict(zip(FOUR, (0.25, 1.5, 2.0, 4.0), strict=True))
    drawn = exploit_draws(4000, count=1, counts=counts, delta=0.5, draw="multinomial")
    shares = np.array([count + 0.5 for count in counts.values()]) / (sum(counts.values()) + 2.0)
    observed = [drawn[(name,)] for name in FOUR]
    assert stats.chisquare(observed, shares * 4000).pvalue > NOISE_LEVEL


@pytest.mark.parametrize("draw", ["top-k", "multinomial"])
def test_a_delta_that_underflows_draws_evenly(draw: str) -> None:
    """Gamma(1e-6) draws are all zero in floating point: every draw would then be the first blocks."""
    drawn = exploit_draws(2000, count=1, delta=1e-6, draw=draw)
    assert stats.chisquare([drawn[(name,)] for name in FOUR]).pvalue > NOISE_LEVEL


@pytest.mark.parametrize("shape", [0.01, 0.5, 1.0, 7.0, 1e6])
def test_log_gamma_follows_its_law(shape: float) -> None:
    generator = random_stream(seed=0, step=0, purpose="test")
    sample = [log_gamma(generator, shape) for _ in range(4000)]
    assert stats.kstest(sample, stats.loggamma(shape).cdf).pvalue > NOISE_LEVEL


def test_gumbel_follows_its_law() -> None:
    generator = random_stream(seed=0, step=0, purpose="test")
    assert stats.kstest([gumbel(generator) for _ in range(4000)], stats.gumbel_r.cdf).pvalue > NOISE_LEVEL


@pytest.mark.parametrize("bits", [0, 2**52 - 1])
def test_the_ends_of_the_uniform_draw_have_finite_logarithms(bits: int) -> None:
    class Constant(random.Random):
        def getrandbits(self, _: int) -> int:
            return bits

    assert 0 < open_uniform(Constant()) < 1
    assert math.isfinite(gumbel(Constant()))


def test_every_choice_has_draws_of_its_own() -> None:
    policy = bound(BLOCK_NAMES, count=1)
    assert len({policy.propose(step) for step in range(1, 60)}) == len(BLOCK_NAMES)


# --- no feedback trap -----------------------------------------------------------------------------------


def test_a_block_never_selected_returns_when_its_gradient_grows() -> None:
    """An observer that measures only what is trainable can only re-rank what is already selected."""
    policy = bound(count=1, explore_steps=100, epsilon_end=1.0)
    for step in range(10):
        assert take_step(policy, step, dict(zip(FOUR, (0.1, 0.1, 0.1, 1.0), strict=True))) == (FOUR[3],)
    growing = dict(zip(FOUR, (0.1, 5.0, 0.1, 1.0), strict=True))
    assert (FOUR[1],) in [take_step(policy, step, growing) for step in range(10, 14)]


def test_blocks_not_selected_are_scored_too() -> None:
    policy = bound(count=1)
    take_step(policy, 0, dict(zip(FOUR, (1.0, 2.0, 3.0, 4.0), strict=True)))
    assert list(policy.scores.values()) == [1.0, 2.0, 3.0, 4.0]
    assert list(policy.counts.values()) == [0, 0, 0, 1]


@pytest.mark.parametrize("nothing", [0.0, math.nan, math.inf])
def test_gradients_that_are_all_zero_or_not_finite_count_for_no_block(nothing: float) -> None:
    """A batch of GRPO with equal rewards gave the first blocks a lead that had no reason."""
    policy = bound(count=1, explore_steps=100, epsilon_end=1.0)
    for step in range(5):
        take_step(policy, step, dict.fromkeys(FOUR, nothing))
    assert set(policy.counts.values()) == {0.0}
    take_step(policy, 5, dict(zip(FOUR, (0.0, 0.0, 0.1, 0.0), strict=True)))
    assert list(policy.counts.values()) == [0, 0, 1, 0]


@pytest.mark.parametrize("draw", ["top-k", "multinomial"])
def test_every_block_can_come_in_an_exploit_step(draw: str) -> None:
    counts = dict(zip(FOUR, (0.0, 0.0, 4.0, 4.0), strict=True))
    drawn = exploit_draws(3000, count=2, counts=counts, draw=draw)
    assert {name for selection in drawn for name in selection} == set(FOUR)


# --- against lock-in ------------------------------------------------------------------------------------


def num_selections(**options: object) -> Counter[str]:
    """Count the updates of each block in 300 steps whose gradients always favour the same blocks."""
    policy = bound(BLOCK_NAMES, count=2, explore_steps=50, **options)  # type: ignore[arg-type]
    norms = {name: 1.0 / position for position, name in enumerate(BLOCK_NAMES, start=1)}
    return Counter(name for step in range(300) for name in take_step(policy, step, norms))


@pytest.mark.parametrize(
    "against",
    [{"delta": 1000.0}, {"delta_growth": 30.0}, {"discount": 0.8}, {"coverage": 8}, {"draw": "multinomial"}],
    ids=repr,
)
def test_each_option_against_lock_in_spreads_the_updates(against: dict[str, object]) -> None:
    locked, free = num_selections(), num_selections(**against)
    favoured = BLOCK_NAMES[:2]
    assert sum(locked[name] for name in favoured) > 590
    assert sum(free[name] for name in favoured) < 550


def test_a_discount_weighs_choices_and_norms_by_their_age() -> None:
    policy = bound(count=2, explore_steps=20, discount=0.5, seed=2)
    selections, explored = [], []
    for step in range(12):
        explored.append(policy.propose(step) is None)
        selections.append(take_step(policy, step, {name: norms_at(0)[name] * (step + 1) for name in FOUR}))
    assert 1 < sum(explored) < 12
    ages = [0.5 ** (11 - step) for step in range(12)]
    for name in FOUR:
        assert policy.counts[name] == pytest.approx(sum(ages[step] for step in range(12) if name in selections[step]))
        seen = (ages[step] * norms_at(0)[name] * (step + 1) for step in range(12) if explored[step])
        assert policy.scores[name] == pytest.approx(sum(seen))


def test_a_discounted_ranking_is_that_of_the_scores_it_leaves() -> None:
    policy = bound(count=2, explore_steps=20, discount=0.5, epsilon_end=1.0)
    for step in range(12):
        norms = {name: norms_at(step)[name] for name in FOUR}
        selected = take_step(policy, step, norms)
        finite = {name: score if math.isfinite(norms[name]) else -1.0 for name, score in policy.scores.items()}
        assert selected == largest(FOUR, finite, 2)


def test_delta_growth_is_a_larger_delta_at_a_later_step() -> None:
    for step in range(1, 40):
        growing = bound(count=2, counts=COUNTS, delta=0.5, delta_growth=0.25)
        assert growing.propose(step) == bound(count=2, counts=COUNTS, delta=0.5 + 0.25 * step).propose(step)


def test_a_due_block_comes_first_in_explore_steps_even_with_a_broken_gradient() -> None:
    policy = bound(count=1, explore_steps=99, epsilon_end=1.0, coverage=4)
    norms = dict(zip(FOUR, (math.nan, 1.0, 2.0, 3.0), strict=True))
    assert {take_step(policy, step, norms)[0] for step in range(4)} == set(FOUR)


def test_coverage_leaves_all_freedom_that_the_promise_allows() -> None:
    """With a large coverage the first selections equal those without coverage."""
    with_floor, without = bound(BLOCK_NAMES, count=2, coverage=40), bound(BLOCK_NAMES, count=2)
    norms = dict.fromkeys(BLOCK_NAMES, 1.0)
    first = [[take_step(policy, step, norms) for step in range(30)] for policy in (with_floor, without)]
    assert first[0] == first[1]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_coverage_holds_whatever_the_free_places_go_to(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, 9), label="blocks")
    count = data.draw(st.integers(1, num_blocks), label="count")
    every = data.draw(st.integers(1, 4), label="every")
    least = (math.ceil(num_blocks / count) - 1) * every + 1
    coverage = data.draw(st.integers(least, least + 12), label="coverage")
    names = tuple(f"layer.{number}" for number in range(num_blocks))
    policy = bound(names, count=count, every=every, coverage=coverage, explore_steps=10**6, epsilon_end=1.0)
    adversary = data.draw(st.randoms(use_true_random=False))
    favourite = dict(zip(names, adversary.sample(range(1, num_blocks + 1), num_blocks), strict=True))
    waiting = dict.fromkeys(names, 0)
    for step in range(5 * coverage + 5 * every):
        norms = {name: 1000.0 * favourite[name] + adversary.random() for name in names}
        selected = take_step(policy, step, norms)
        assert len(selected) == count
        waiting = {name: 0 if name in selected else waited + 1 for name, waited in waiting.items()}
        assert max(waiting.values()) < coverage


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(slacks=st.lists(st.integers(0, 6), min_size=1, max_size=10), count=st.integers(1, 4))
def test_due_is_the_smallest_prefix_of_deadlines_that_leaves_the_rest_feasible(slacks: list[int], count: int) -> None:
    """Against the definition: after this selection, d more selections must have places for all with slack <= d."""
    named = {f"layer.{number}": slack for number, slack in enumerate(slacks)}
    chosen = due(named, count)

    def feasible(taken: int) -> bool:
        left = sorted(slacks)[taken:]
        return all(sum(slack <= choices for slack in left) <= choices * count for choices in range(7))

    assert sorted(named[name] for name in chosen) == sorted(slacks)[: len(chosen)]
    assert feasible(len(chosen))
    assert not chosen or not feasible(len(chosen) - 1)


# --- options --------------------------------------------------------------------------------------------


def test_between_choices_the_selection_stays_and_counts_once() -> None:
    policy = bound(BLOCK_NAMES, count=2, every=5, delta=100.0)
    norms = dict.fromkeys(BLOCK_NAMES, 1.0)
    selections = [take_step(policy, step, norms) for step in range(40)]
    assert all(selections[step] == selections[step - step % 5] for step in range(40))
    assert len(set(selections)) > 3
    assert sum(policy.counts.values()) == 2 * 40 / 5


def test_a_fifth_of_the_blocks_is_the_default_and_one_the_least() -> None:
    assert bound(tuple(f"layer.{number}" for number in range(24))).keep_at(0) == 5
    assert bound(FOUR[:2]).keep_at(0) == 1


def test_the_fraction_is_of_the_blocks_taking_part() -> None:
    policy = AdaGradSelect(fraction=0.4, among=("layer.*",), explore_steps=9).bind(make_blocks())
    assert policy.keep_at(0) == 2
    assert set(policy.decide(0, dict.fromkeys(BLOCK_NAMES, 1.0))) <= {name for name in BLOCK_NAMES if "layer" in name}


def test_an_unknown_epoch_length_says_what_to_write_before_the_first_update() -> None:
    policy = AdaGradSelect(count=1).bind(make_blocks())
    assert policy.propose(0) is None
    for ask in (lambda: policy.decide(0, dict.fromkeys(BLOCK_NAMES, 1.0)), lambda: policy.propose(1)):
        with pytest.raises(UsageError, match=r"write AdaGradSelect\(explore_steps=len\(loader\) // 4\)"):
            ask()


def test_a_filled_epoch_length_acts_as_a_given_one_and_is_saved() -> None:
    given_steps, filled = AdaGradSelect(explore_steps=20), AdaGradSelect()
    filled = filled.bind(make_blocks())
    filled.fill_explore_steps(20)
    filled.fill_explore_steps(99)
    norms = dict.fromkeys(BLOCK_NAMES, 1.0)
    given_steps = given_steps.bind(make_blocks())
    for step in range(30):
        assert take_step(filled, step, norms) == take_step(given_steps, step, norms)
    resumed = AdaGradSelect().bind(make_blocks())
    resumed.load_state(filled.state())
    assert [resumed.propose(step) for step in range(1, 40)] == [filled.propose(step) for step in range(1, 40)]
    assert filled.settings()["explore_steps"] is None  # so a checkpoint and a fresh policy have the same settings


def test_a_given_epoch_length_is_not_overwritten() -> None:
    policy = AdaGradSelect(explore_steps=10).bind(make_blocks())
    policy.fill_explore_steps(1000)
    assert policy.explore_probability(10) == 0.0


def test_an_epoch_length_filled_before_binding_is_kept() -> None:
    policy = AdaGradSelect()
    policy.fill_explore_steps(10)
    assert policy.bind(make_blocks()).explore_probability(5) == pytest.approx(0.1)


@pytest.mark.parametrize(("preset", "expected"), [(None, (62, 25, 1)), ("paper", (62, 62, 2))])
def test_explore_steps_left_open_are_at_most_a_quarter_of_the_run(preset: Any, expected: tuple[int, ...]) -> None:
    found = []
    for in_epoch, in_run in ((62, None), (62, 100), (2, 3)):
        policy = AdaGradSelect(preset=preset)
        policy.fill_explore_steps(in_epoch, run_steps=in_run)
        found.append(policy.known_explore_steps())
    assert tuple(found) == expected


@pytest.mark.parametrize(
    ("preset", "steps", "expected"),
    [
        (None, {"num_steps": 100}, 25),
        (None, {"num_steps": 100, "epoch_steps": 62}, 25),
        (None, {"num_steps": 1000, "epoch_steps": 62}, 62),
        (None, {"epoch_steps": 62}, 62),
        ("paper", {"num_steps": 100, "epoch_steps": 62}, 62),
    ],
)
def test_a_loop_that_gives_its_steps_explores_as_long_as_a_trainer(preset: Any, steps: Any, expected: int) -> None:
    method = gs.method({"name": "adagradselect", "preset": preset})
    optimizer = method.make_optimizer(tiny_models.tiny_llama(), lr=1e-3, **steps)
    assert isinstance(optimizer, BlockOptimizer)
    assert optimizer.policy.known_explore_steps() == expected  # type: ignore[attr-defined]


def test_the_paper_s_first_epoch_is_not_guessed_from_the_steps_of_the_run() -> None:
    method = gs.method({"name": "adagradselect", "preset": "paper"})
    optimizer = method.make_optimizer(tiny_models.tiny_llama(), lr=1e-3, num_steps=100)
    with pytest.raises(UsageError, match=r"make_optimizer\(num_steps=..., epoch_steps=len\(loader\)\)"):
        optimizer.policy.known_explore_steps()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["num_steps", "epoch_steps"])
def test_a_loop_of_no_steps_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}=0 is not a whole number from 1 on"):
        gs.method("adagradselect").make_optimizer(tiny_models.tiny_llama(), lr=1e-3, **{name: 0})


# --- defaults and the paper's setting -------------------------------------------------------------------


def test_by_default_the_blocks_around_the_layers_are_no_candidates() -> None:
    inside = ("encoder.layer.0", "layer.1", "layer.1.head", "pooler", "mine")
    around = ("encoder.norm", "embedding", "norm", "head")
    blocks = make_blocks((*inside, *around))
    classifier, blocks = blocks, (*blocks[:-1], replace(blocks[-1], over_vocabulary=True))
    assert AdaGradSelect().bind(blocks).names == inside
    assert AdaGradSelect().bind(classifier).names == (*inside, "head")
    assert AdaGradSelect().bind(blocks[-4:]).names == around  # nothing else is there
    for policy in (AdaGradSelect(among=None), AdaGradSelect(preset="paper")):
        assert policy.bind(blocks).names == (*inside, *around)
    assert AdaGradSelect(preset="paper", among=("layer.*",)).bind(blocks).names == ("layer.1", "layer.1.head")
    assert GradNormTopK(count=1, among=("layers", "embedding")).bind(blocks).names == (*inside, "embedding")
    assert Uniform(count=1, among="layers").bind(blocks).names == inside


class Wrapped(nn.Module):
    """A model of the user's own around one of transformers, with names of its own."""

    def __init__(self, *, classifies: bool = False) -> None:
        super().__init__()
        self.inner = tiny_models.tiny_llama()
        if classifies:
            self.inner, self.classifier = self.inner.model, nn.Linear(tiny_models.HIDDEN, 3)


@pytest.mark.parametrize(
    ("make", "left_out"),
    [
        (tiny_models.tiny_llama, ["embedding", "norm", "head"]),
        (Wrapped, ["embedding", "norm", "head"]),
        (lambda: Wrapped(classifies=True), ["embedding", "norm"]),
        (tiny_models.tiny_gpt2, ["embedding", "norm"]),  # tied
        (tiny_models.tiny_bert_classifier, ["embedding"]),
        (tiny_models.tiny_t5, ["embedding", "encoder.norm", "decoder.norm"]),
        (tiny_models.tiny_lora, []),
    ],
)
def test_of_a_model_the_ends_are_no_candidates_unless_a_classifier_is_one(
    make: Callable[[], nn.Module], left_out: list[str]
) -> None:
    blocks = partition(make())
    assert [block.name for block in blocks if block.name not in AdaGradSelect().bind(blocks).names] == left_out


def test_a_preset_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="preset='papers' is unknown; write preset="):
        AdaGradSelect(preset="papers")  # type: ignore[arg-type]


def test_the_paper_s_setting_has_the_settings_of_older_checkpoints() -> None:
    saved = {"fraction": 0.2, "count": None, "explore_steps": None, "epsilon_end": 0.01, "delta": 1.0}
    saved |= {"rank_by": "cumulative", "norm": "l2", "draw": "top-k", "among": None, "every": 1, "discount": 1.0}
    saved |= {"coverage": None, "delta_growth": 0.0, "seed": 0}
    assert AdaGradSelect(preset="paper").settings() == saved
    assert AdaGradSelect().settings() == saved | {"among": ("layers",)}
    assert AdaGradSelect(among=("layer.*",)).settings() == saved | {"among": ("layer.*",)}


def test_a_checkpoint_of_the_former_default_goes_on_in_the_paper_s_setting() -> None:
    model = tiny_models.tiny_llama()
    saved = BlockOptimizer(model, AdaGradSelect(among=None, explore_steps=3), lr=1e-3).state_dict()
    BlockOptimizer(tiny_models.tiny_llama(), AdaGradSelect(preset="paper", explore_steps=3), lr=1e-3).load_state_dict(
        saved
    )
    other = BlockOptimizer(tiny_models.tiny_llama(), AdaGradSelect(explore_steps=3), lr=1e-3)
    with pytest.raises(UsageError, match=r"policy settings: .*among.*None.*layers"):
        other.load_state_dict(saved)


def test_an_epoch_without_steps_is_refused() -> None:
    with pytest.raises(UsageError, match="explore_steps=0"):
        AdaGradSelect().fill_explore_steps(0)


def test_the_least_coverage_is_in_the_message() -> None:
    """Seven blocks, two at a time, every three steps: the last of them comes at the fourth selection, step 9."""
    with pytest.raises(UsageError, match="write coverage=10 or more"):
        AdaGradSelect(count=2, every=3, coverage=9, among=None).bind(make_blocks())
    AdaGradSelect(count=2, every=3, coverage=10, among=None).bind(make_blocks())
