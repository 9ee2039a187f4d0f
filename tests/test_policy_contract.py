"""The contract of every policy, from one table: a new policy is one row."""

import copy
import inspect
import math
import random
from collections import Counter
from collections.abc import Callable, Collection

import numpy as np
import pytest
import torch
from policy_support import BLOCK_NAMES, NUM_STEPS, choose, make_blocks, run, through_torch
from reach_support import parts, steps
from resume_support import same

from gradselect import BlockOptimizer, UsageError, partition, policies
from gradselect.blocks.policy import AbstractPolicy, resolve_count
from gradselect.policies import (
    MISA,
    AdaGradSelect,
    All,
    CostAware,
    Cyclic,
    Fixed,
    GradNormTopK,
    LoSiA,
    Spectrum,
    Stratified,
    Uniform,
)

# What to build, given a seed. Rows that ignore the seed draw nothing.
TABLE: dict[str, Callable[[int], AbstractPolicy]] = {
    "all": lambda _: All(),
    "fixed": lambda _: Fixed(("layer.4", "embedding", "layer.1")),
    "fixed by glob": lambda _: Fixed(("layer.*",)),
    "uniform": lambda seed: Uniform(count=2, seed=seed),
    "uniform, LISA": lambda seed: Uniform(count=2, every=5, among=("layer.*",), seed=seed),
    "cyclic": lambda seed: Cyclic(every=3, seed=seed),
    "cyclic, two of seven": lambda seed: Cyclic(every=2, count=2, seed=seed),
    "cyclic ascending": lambda _: Cyclic(every=2, order="ascending"),
    "cyclic descending": lambda _: Cyclic(every=1, order="descending", count=3),
    "cyclic among layers": lambda seed: Cyclic(every=1, among=("layer.*",), seed=seed),
    "norm top-k": lambda _: GradNormTopK(fraction=0.3),
    "norm top-k, refresh": lambda _: GradNormTopK(count=3, refresh=4, ema=0.9, norm="rms"),
    "norm top-k, temperature": lambda seed: GradNormTopK(count=2, refresh=3, temperature=0.5, seed=seed),
    "norm top-k, GRASS": lambda seed: GradNormTopK(
        count=2, refresh=4, temperature="spread", ema=0.9, probe_steps=6, norm="rms", among=("layer.*",), seed=seed
    ),
    "norm top-k, probe only": lambda _: GradNormTopK(count=2, refresh=4, probe_steps=6),
    "norm top-k, once": lambda _: GradNormTopK(count=2, refresh=None),
    "norm top-k, once, probes": lambda _: GradNormTopK(count=2, refresh=None, probe_steps=6),
    "adagradselect": lambda seed: AdaGradSelect(explore_steps=30, seed=seed),
    "adagradselect, the paper's": lambda seed: AdaGradSelect(preset="paper", explore_steps=30, seed=seed),
    "adagradselect, rms, step, multinomial": lambda seed: AdaGradSelect(
        count=3, explore_steps=30, rank_by="step", norm="rms", draw="multinomial", among=("layer.*", "norm"), seed=seed
    ),
    "adagradselect, every": lambda seed: AdaGradSelect(count=2, explore_steps=30, every=4, seed=seed),
    "adagradselect, forgetting": lambda seed: AdaGradSelect(
        count=2, explore_steps=30, discount=0.9, delta_growth=0.1, seed=seed
    ),
    "adagradselect, coverage": lambda seed: AdaGradSelect(count=2, explore_steps=30, delta=0.01, coverage=4, seed=seed),
    "adagradselect, coverage, every": lambda seed: AdaGradSelect(
        count=2, explore_steps=30, delta=0.01, coverage=12, every=3, draw="multinomial", seed=seed
    ),
    "cost aware": lambda seed: CostAware(count=2, explore_steps=30, seed=seed),
    "cost aware, all blocks": lambda seed: CostAware(count=2, explore_steps=30, among=None, seed=seed),
    "cost aware, SGD": lambda seed: CostAware(
        count=3, explore_steps=20, gain="l2", full_every=2, floor=0.5, delta=10.0, among=("layer.*", "norm"), seed=seed
    ),
    "misa": lambda seed: MISA(share=0.3, every=5, seed=seed),
    "misa, among layers": lambda seed: MISA(share=0.5, every=1, eta=4.0, ema=0.5, among=("layer.*",), seed=seed),
    "adagradselect, strata": lambda seed: AdaGradSelect(
        fraction=0.5, explore_steps=30, strata="category", coverage=9, every=2, seed=seed
    ),
    "stratified": lambda seed: Stratified(by="category", fraction=0.5, every=2, seed=seed),
    "stratified, rotate": lambda _: Stratified(by="category", count=2, order="rotate", every=3),
    "stratified, rotate, aligned": lambda _: Stratified(by="category", fraction=0.5, order="rotate", stagger=False),
    "stratified, fixed": lambda seed: Stratified(by="category", count=2, order="fixed", seed=seed),
    "losia": lambda seed: LoSiA(by="category", count=2, every=3, seed=seed),
    "losia, by fraction": lambda seed: LoSiA(by="category", fraction=0.5, every=1, ema=0.5, seed=seed),
    "spectrum": lambda _: Spectrum(fraction=0.5),
    "spectrum, all": lambda _: Spectrum(fraction=1.0, among=("layer.1", "layer.3")),
    "stratified, norm": lambda _: Stratified(by="category", count=2, order="norm", every=4),
}
# Rows that draw at every selection: one draw for all steps is often the same for two seeds.
RANDOM = [
    name
    for name in TABLE
    if repr(TABLE[name](0)) != repr(TABLE[name](1)) and not name.startswith(("stratified, fixed", "losia"))
]

each_policy = pytest.mark.parametrize("make", TABLE.values(), ids=TABLE.keys())


def test_every_exported_policy_has_a_row_and_is_final() -> None:
    exported = {value for value in vars(policies).values() if inspect.isclass(value)}
    assert exported == {type(make(0)) for make in TABLE.values()}
    assert all(getattr(policy, "__final__", False) for policy in exported)


@each_policy
def test_a_selection_is_of_known_blocks_in_model_order(make: Callable[[int], AbstractPolicy]) -> None:
    policy = make(0).bind(make_blocks())
    for selected in run(policy):
        assert selected == tuple(name for name in policy.names if name in selected)


@each_policy
def test_candidates_are_the_blocks_taking_part_and_all_of_them_can_be_selected(
    make: Callable[[int], AbstractPolicy],
) -> None:
    policy = make(0).bind(make_blocks())
    assert policy.names == tuple(name for name in BLOCK_NAMES if name in policy.names)
    among = policy.settings().get("among")
    if among:
        assert set(policy.names) <= {name for name in BLOCK_NAMES if name.startswith("layer.") or name in among}
    if isinstance(policy, GradNormTopK) and policy.temperature is None:
        return  # the given norms decide
    if isinstance(policy, Spectrum):
        return  # the weights decide
    missing = set(policy.names)
    for seed in range(200):
        missing.difference_update(*run(make(seed).bind(make_blocks())))
        if not missing:
            return
    assert not missing


@each_policy
def test_a_selection_has_exactly_the_size_asked_for(make: Callable[[int], AbstractPolicy]) -> None:
    policy = make(0).bind(make_blocks())
    settings, num_blocks = policy.settings(), len(policy.names)
    for step, selected in enumerate(run(policy)):
        if step < settings.get("probe_steps", 0):
            assert selected == ()
        elif isinstance(policy, MISA):
            # One may be larger than the share on its own.
            total = sum(policy.num_elements[name] for name in policy.names)
            weights = sum(policy.num_elements[name] for name in selected)
            assert len(selected) == 1 or weights <= policy.share * total
            assert selected
        elif isinstance(policy, Cyclic):
            last_of_round = num_blocks % policy.count or policy.count
            assert len(selected) in (policy.count, last_of_round)
        elif settings.get("by") or settings.get("strata"):
            in_strata = Counter(map(policy.stratum, selected))
            assert in_strata == {stratum: policy.keep_in(step, stratum) for stratum in in_strata}
            assert set(in_strata) == set(map(policy.stratum, policy.names))
        elif isinstance(policy, Spectrum):
            assert len(selected) == max(1, round(policy.fraction * num_blocks))
        elif "fraction" in settings:
            fraction, count = settings["fraction"], settings["count"]
            assert len(selected) == resolve_count(num_blocks=num_blocks, fraction=fraction, count=count)
        else:
            assert selected == policy.names


@each_policy
def test_a_decision_is_the_keep_blocks_of_largest_score(make: Callable[[int], AbstractPolicy]) -> None:
    """The observer frees gradients by score only; the decision must agree with the gradients that remain."""
    policy = make(0).bind(make_blocks())
    for step in range(NUM_STEPS):
        selected, norms = choose(policy, step)
        if policy.propose(step) is None:
            assert len(selected) == policy.keep_at(step)
            scores = {name: policy.score(step, name, norms[name]) for name in policy.names}
            for stratum in set(map(policy.stratum, policy.names)):
                rivals = {name: scores[name] for name in policy.names if policy.stratum(name) == stratum}
                worst_in = min((score for name, score in rivals.items() if name in selected), default=math.inf)
                best_out = max((score for name, score in rivals.items() if name not in selected), default=-math.inf)
                assert worst_in >= best_out or policy.keep_in(step, stratum) == 0
        policy.commit(step, selected, norms)


@each_policy
def test_asking_changes_nothing(make: Callable[[int], AbstractPolicy]) -> None:
    policy = make(0).bind(make_blocks())
    for step in range(NUM_STEPS):
        before = policy.state()
        first, norms = choose(policy, step)
        for other in (step + 1, 0, step):
            if other == 0 or step > 0:
                policy.propose(other)
        assert choose(policy, step)[0] == first
        assert policy.state() == before
        policy.commit(step, first, norms)


@each_policy
def test_the_selection_is_a_function_of_seed_and_step(make: Callable[[int], AbstractPolicy]) -> None:
    assert list(run(make(7).bind(make_blocks()))) == list(run(make(7).bind(make_blocks())))


@pytest.mark.parametrize("name", RANDOM)
def test_another_seed_selects_otherwise(name: str) -> None:
    runs = {tuple(run(TABLE[name](seed).bind(make_blocks()))) for seed in range(8)}
    assert len(runs) == 8


@each_policy
def test_no_global_random_state_is_read_or_written(make: Callable[[int], AbstractPolicy]) -> None:
    def selections(global_seed: int) -> list[tuple[str, ...]]:
        random.seed(global_seed)
        np.random.seed(global_seed)
        torch.manual_seed(global_seed)
        return list(run(make(3).bind(make_blocks())))

    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        first = selections(1)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        assert selections(2) == first
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])


@each_policy
def test_saved_and_loaded_at_any_step_it_continues_alike(make: Callable[[int], AbstractPolicy]) -> None:
    policy = make(5).bind(make_blocks())
    whole = list(run(make(5).bind(make_blocks())))
    for stop in range(NUM_STEPS):
        resumed = make(5).bind(make_blocks())
        resumed.load_state(through_torch(policy.state()))
        assert list(run(policy, range(stop, stop + 1))) == whole[stop : stop + 1]
        if stop % 20 == 10:
            assert list(run(resumed, range(stop, NUM_STEPS))) == whole[stop:]
        else:  # one step suffices: then it is what the next one begins with
            assert list(run(resumed, range(stop, stop + 1))) == whole[stop : stop + 1]
            assert same(resumed.state(), policy.state())


@each_policy
def test_a_saved_state_does_not_change_with_the_policy(make: Callable[[int], AbstractPolicy]) -> None:
    policy = make(0).bind(make_blocks())
    list(run(policy, range(10)))
    state = policy.state()
    kept = through_torch(state)
    resumed = make(0).bind(make_blocks())
    resumed.load_state(state)
    list(run(policy, range(10, 40)))
    list(run(resumed, range(10, 40)))
    assert state == kept


@each_policy
def test_the_state_of_another_kind_of_policy_is_refused(make: Callable[[int], AbstractPolicy]) -> None:
    with pytest.raises(UsageError, match="resume with the policy that was saved"):
        make(0).bind(make_blocks()).load_state({"something": 1})


@each_policy
def test_promised_coverage_is_kept(make: Callable[[int], AbstractPolicy]) -> None:
    for seed in range(8):
        policy = make(seed).bind(make_blocks())
        window = policy.coverage_steps
        if window is None:
            return
        selections = list(run(policy, range(6 * window + 40)))
        for start in range(len(selections) - window + 1):
            assert set().union(*selections[start : start + window]) == set(policy.names)


def test_coverage_is_promised_where_it_can_be() -> None:
    promising = {name for name in TABLE if TABLE[name](0).bind(make_blocks()).coverage_steps is not None}
    expected = {name for name in TABLE if name.startswith(("all", "fixed", "cyclic")) or "rotate" in name}
    expected |= {name for name in TABLE if "coverage" in name or "adagradselect, strata" in name}
    assert promising == expected


@each_policy
def test_binding_leaves_the_original_unbound_and_copies_apart(make: Callable[[int], AbstractPolicy]) -> None:
    original = make(0)
    untouched = copy.deepcopy(vars(original))
    first, second = original.bind(make_blocks()), original.bind(make_blocks())
    before = second.state()
    selections = list(run(first))
    assert vars(original) == untouched
    assert original.names == ()
    assert second.state() == before
    assert list(run(first.bind(make_blocks()))) == selections


@each_policy
def test_settings_are_plain_and_build_the_same_policy(make: Callable[[int], AbstractPolicy]) -> None:
    policy = make(4).bind(make_blocks())
    settings = through_torch(policy.settings())
    assert settings == policy.settings()
    assert list(run(type(policy)(**settings).bind(make_blocks()))) == list(run(policy))
    assert policy.settings() == make(4).settings()


@each_policy
def test_one_block_is_enough(make: Callable[[int], AbstractPolicy]) -> None:
    policy = make(0)
    settings = policy.settings()
    fewer = {"count": 1} if settings.get("count") else {}
    everything = {"among": None} if settings.get("among") else {"blocks": ("*",)} if "blocks" in settings else {}
    single = type(policy)(**settings | fewer | everything).bind(make_blocks(BLOCK_NAMES[1:2]))
    probed = settings.get("probe_steps", 0)
    assert list(run(single)) == [()] * probed + [BLOCK_NAMES[1:2]] * (NUM_STEPS - probed)


@each_policy
def test_without_a_block_binding_raises(make: Callable[[int], AbstractPolicy]) -> None:
    with pytest.raises(UsageError, match="no block is left"):
        make(0).bind(())


@each_policy
def test_a_block_that_the_loss_does_not_reach_is_never_selected(make: Callable[[int], AbstractPolicy]) -> None:
    """In the optimizer, on a model of the same blocks whose second and fourth layers are not used."""
    if isinstance(make(0), Spectrum):
        pytest.skip("ranks blocks of one matrix: tests/test_spectrum.py has a test of its own")
    dead = {"layer.1", "layer.3"}
    model = parts(skipped=(1, 3), beside=False, head=False)
    optimizer = BlockOptimizer(model, make(0), lr=1e-3)
    candidates = optimizer.policy.names
    selections = steps(model, optimizer, range(24))
    assert len(selections) >= 22
    assert all(dead.isdisjoint(selection) for selection in selections)
    assert set(optimizer.unreached) == dead.intersection(candidates)
    assert optimizer.policy.names == tuple(name for name in candidates if name not in dead)
    assert {name for name, count in optimizer.update_counts.items() if count} <= set(optimizer.policy.names)


@each_policy
def test_blocks_that_drop_out_and_come_back_leave_the_state_whole(make: Callable[[int], AbstractPolicy]) -> None:
    policy = make(0).bind(make_blocks())
    blocks, keys = policy.candidates, policy.state().keys()
    for step in range(NUM_STEPS):
        policy.candidates = blocks[::2] if 10 <= step < 40 else blocks
        selected, norms = choose(policy, step)
        assert set(selected) <= set(policy.names)
        policy.commit(step, selected, norms)
    assert policy.state().keys() == keys


PERIOD = 20
PERIODIC: dict[str, Callable[[], AbstractPolicy]] = {
    "uniform": lambda: Uniform(count=2, every=PERIOD),
    "cyclic": lambda: Cyclic(count=2, every=PERIOD),
    "adagradselect": lambda: AdaGradSelect(count=2, explore_steps=1, every=PERIOD, among=None),
    "misa": lambda: MISA(share=0.5, every=PERIOD),
    "norm top-k": lambda: GradNormTopK(count=2, refresh=PERIOD),
    "norm top-k, probes": lambda: GradNormTopK(count=2, refresh=PERIOD, probe_steps=PERIOD),
    "stratified": lambda: Stratified(by="category", fraction=0.5, every=PERIOD),
    "stratified, rotate": lambda: Stratified(by="category", fraction=0.5, order="rotate", every=PERIOD),
    "stratified, norm": lambda: Stratified(by="category", fraction=0.5, order="norm", every=PERIOD),
}
each_period = pytest.mark.parametrize("make", PERIODIC.values(), ids=PERIODIC.keys())


def take_among(policy: AbstractPolicy, step: int, names: Collection[str]) -> tuple[str, ...]:
    """Take a step in which only these blocks are candidates; return the selection."""
    policy.candidates = tuple(block for block in make_blocks() if block.name in names)
    selected, norms = choose(policy, step)
    policy.commit(step, selected, norms)
    return selected


def after_a_period(make: Callable[[], AbstractPolicy]) -> AbstractPolicy:
    policy = make().bind(make_blocks())
    for step in range(PERIOD):
        take_among(policy, step, BLOCK_NAMES)
    return policy


@each_period
def test_within_a_period_what_was_selected_stays_selected_as_far_as_it_is_a_candidate(
    make: Callable[[], AbstractPolicy],
) -> None:
    """Uniform and Cyclic drew anew, and others did not take back what had left, when a vision tower came and went."""
    policy = after_a_period(make)
    begun = take_among(policy, PERIOD, BLOCK_NAMES)
    assert len(begun) > 1
    for step in range(PERIOD + 1, 2 * PERIOD):
        names = {begun[step % len(begun)], *random.Random(step).sample(BLOCK_NAMES, 4)}
        assert take_among(policy, step, names) == tuple(name for name in begun if name in names)


@each_period
def test_what_is_drawn_when_nothing_of_a_selection_is_left_stays_for_the_rest_of_the_period(
    make: Callable[[], AbstractPolicy],
) -> None:
    policy = after_a_period(make)
    begun = take_among(policy, PERIOD, BLOCK_NAMES)
    others = [name for name in BLOCK_NAMES if name not in begun]
    drawn = take_among(policy, PERIOD + 1, others)
    assert drawn
    for step in range(PERIOD + 2, 2 * PERIOD):
        resumed = make().bind(make_blocks())
        resumed.load_state(through_torch(policy.state()))
        names = {drawn[step % len(drawn)], *random.Random(step).sample(others, 2)}
        expected = tuple(name for name in drawn if name in names)
        assert take_among(policy, step, names) == take_among(resumed, step, names) == expected


@each_period
def test_an_empty_selection_does_not_stay_for_a_period(make: Callable[[], AbstractPolicy]) -> None:
    """All that was selected turned out to be unreached, while a block of `always` trained."""
    policy = after_a_period(make)
    policy.commit(PERIOD, (), {})
    assert take_among(policy, PERIOD + 1, BLOCK_NAMES)


@pytest.mark.parametrize("name", ["uniform", "cyclic"])
def test_a_checkpoint_from_before_selections_were_kept_continues_alike(name: str) -> None:
    whole = list(run(PERIODIC[name]().bind(make_blocks())))
    for stop in (0, 1, PERIOD, PERIOD + 7):
        resumed = PERIODIC[name]().bind(make_blocks())
        resumed.load_state({})
        assert list(run(resumed, range(stop, NUM_STEPS))) == whole[stop:]


BAD_SETTINGS: list[tuple[Callable[[], AbstractPolicy], str]] = [
    (lambda: AdaGradSelect(fraction=0.0), "fraction=0.0 is outside"),
    (lambda: AdaGradSelect(fraction=1.5), "fraction=1.5 is outside"),
    (lambda: AdaGradSelect(fraction=math.nan), "fraction=nan is outside"),
    (lambda: AdaGradSelect(fraction=0.2, count=2), "give one of them"),
    (lambda: AdaGradSelect(count=0), "count=0 is not a whole number"),
    (lambda: AdaGradSelect(explore_steps=0), "explore_steps=0 is not"),
    (lambda: AdaGradSelect(explore_steps=2.5), "explore_steps=2.5 is not"),  # type: ignore[arg-type]
    (lambda: AdaGradSelect(epsilon_end=0.0), "epsilon_end=0.0 is outside"),
    (lambda: AdaGradSelect(epsilon_end=1.1), "epsilon_end=1.1 is outside"),
    (lambda: AdaGradSelect(delta=0.0), "delta=0.0 is outside"),
    (lambda: AdaGradSelect(delta=math.inf), "delta=inf is outside"),
    (lambda: AdaGradSelect(delta_growth=-1.0), "delta_growth=-1.0 is outside"),
    (lambda: AdaGradSelect(discount=0.0), "discount=0.0 is outside"),
    (lambda: AdaGradSelect(every=0), "every=0 is not"),
    (lambda: AdaGradSelect(every=True), "every=True is not"),
    (lambda: AdaGradSelect(coverage=0), "coverage=0 is not"),
    (lambda: AdaGradSelect(seed=-1), "seed=-1 is not"),
    (lambda: AdaGradSelect(rank_by="sum"), 'rank_by="cumulative" or rank_by="step"'),  # type: ignore[arg-type]
    (lambda: AdaGradSelect(norm="l1"), 'norm="l2" or norm="rms"'),  # type: ignore[arg-type]
    (lambda: AdaGradSelect(draw="topk"), 'draw="top-k" or draw="multinomial"'),  # type: ignore[arg-type]
    (lambda: AdaGradSelect(among=()), r"among=\(\) names no block"),
    (lambda: AdaGradSelect(among=5), "among=5 is no list of block names; write e.g."),  # pyright: ignore[reportArgumentType]
    (lambda: AdaGradSelect(among=["layer.*", 3]), "is no list of block names"),  # pyright: ignore[reportArgumentType]
    (lambda: CostAware(fraction=1.5), "fraction=1.5 is outside"),
    (lambda: CostAware(fraction=0.2, count=2), "give one of them"),
    (lambda: CostAware(full_every=0), "full_every=0 is not"),
    (lambda: CostAware(floor=0.0), "floor=0.0 is outside"),
    (lambda: CostAware(floor=1.5), "floor=1.5 is outside"),
    (lambda: CostAware(gain="taylor"), 'gain="l1" or gain="l2"'),  # type: ignore[arg-type]
    (lambda: CostAware(delta=0.0), "delta=0.0 is outside"),
    (lambda: GradNormTopK(), "give one of them"),
    (lambda: GradNormTopK(count=1, refresh=0), "refresh=0 is not"),
    (lambda: GradNormTopK(count=1, temperature=0.0), "temperature=0.0 is outside"),
    (lambda: GradNormTopK(count=1, ema=1.5), "ema=1.5 is outside"),
    (lambda: GradNormTopK(count=1, probe_steps=-1), "probe_steps=-1 is not"),
    (lambda: GradNormTopK(count=1, norm="max"), "norm='max' is unknown"),  # type: ignore[arg-type]
    (lambda: Uniform(), "give one of them"),
    (lambda: Uniform(count=1, every=0), "every=0 is not"),
    (lambda: Uniform(fraction="a fifth"), "fraction='a fifth' is outside"),  # type: ignore[arg-type]
    (lambda: Cyclic(every=0), "every=0 is not"),
    (lambda: Cyclic(count=0), "count=0 is not"),
    (lambda: Cyclic(order="shuffled"), "order='shuffled' is unknown"),  # type: ignore[arg-type]
    (lambda: MISA(share=0.0), "share=0.0 is outside"),
    (lambda: MISA(every=0), "every=0 is not"),
    (lambda: MISA(eta=0.0), "eta=0.0 is outside"),
    (lambda: MISA(ema=1), "ema=1 would never learn"),
    (lambda: MISA(seed=-1), "seed=-1 is not"),
    (lambda: AdaGradSelect(strata="columns"), 'strata="layer" or strata="category"'),  # type: ignore[arg-type]
    (lambda: Stratified(), "give one of them"),
    (lambda: Stratified(fraction=1.5), "fraction=1.5 is outside"),
    (lambda: Stratified(count=0), "count=0 is not"),
    (lambda: Stratified(count=1, by="columns"), 'by="layer" or by="category"'),  # type: ignore[arg-type]
    (lambda: Stratified(count=1, order="cyclic"), "order='cyclic' is unknown"),  # type: ignore[arg-type]
    (lambda: Stratified(count=1, every=0), "every=0 is not"),
    (lambda: Stratified(count=1, seed=-1), "seed=-1 is not"),
    (lambda: Stratified(count=1, order="rotate", stagger=2), "stagger=2 is no bool"),  # type: ignore[arg-type]
    (lambda: Stratified(count=1, order="fixed", every=5), "draws once; leave one of them out"),
    (lambda: Stratified(count=1, stagger=False), 'or write order="rotate"'),
    (lambda: Stratified(count=1, among=()), r"among=\(\) names no block"),
    (lambda: LoSiA(), "give one of them"),
    (lambda: LoSiA(count=1, every=0), "every=0 is not"),
    (lambda: LoSiA(count=1, ema=0.0), "ema=0.0 is outside"),
    (lambda: LoSiA(count=1, ema=1), "ema=1 would never learn"),
    (lambda: Spectrum(fraction=0.0), "fraction=0.0 is outside"),
    (lambda: Spectrum(among=()), r"among=\(\) names no block"),
    (lambda: Fixed(()), r"blocks=\(\) names no block"),
    (lambda: Fixed(""), "blocks='' names no block"),
]


@pytest.mark.parametrize(("make", "message"), BAD_SETTINGS, ids=[message for _, message in BAD_SETTINGS])
def test_a_wrong_setting_is_refused_with_what_to_write(make: Callable[[], AbstractPolicy], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


MISFITS: list[AbstractPolicy] = [
    AdaGradSelect(count=8),
    AdaGradSelect(count=6, among=("layer.*",)),
    CostAware(count=8),
    CostAware(among=("embedding", "norm")),
    GradNormTopK(count=8),
    Uniform(count=8),
    Cyclic(count=8),
    Fixed(("layer.9",)),
    Spectrum(among=("embedding", "norm")),
    MISA(among=("layer.*.*.*",)),
    Uniform(count=1, among=("decoder.*",)),
    AdaGradSelect(count=2, coverage=3, among=None),
    AdaGradSelect(count=1, strata="layer"),
    AdaGradSelect(count=6, strata="category"),
    AdaGradSelect(count=1, strata="category", coverage=4),
    Stratified(count=1, by="layer"),
    Stratified(count=6, by="category"),
    LoSiA(count=1),
]


@pytest.mark.parametrize("policy", MISFITS, ids=repr)
def test_settings_that_do_not_fit_the_blocks_are_refused_on_binding(policy: AbstractPolicy) -> None:
    with pytest.raises(UsageError):
        policy.bind(make_blocks())


@pytest.mark.parametrize(
    "policy",
    [
        AdaGradSelect(count=1, explore_steps=2, norm="rms", among=None),
        GradNormTopK(count=1, norm="rms"),
        MISA(share=1.0, every=1),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_a_tensor_of_no_entries_is_a_block_like_others(policy: AbstractPolicy) -> None:
    """Norms relative to the number of entries were divided by zero."""
    model = torch.nn.ParameterDict(
        {"full": torch.nn.Parameter(torch.ones(3)), "empty": torch.nn.Parameter(torch.ones(0))}
    )
    blocks = partition(model, patterns={name: name for name in model})
    optimizer = BlockOptimizer(model, policy=policy, blocks=blocks)
    for _ in range(3):
        (model["full"].square().sum() + model["empty"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.num_steps == 3
    optimizer.close()


def test_a_single_name_may_stand_alone() -> None:
    assert Fixed("layer.4").bind(make_blocks()).names == ("layer.4",)
    assert Uniform(count=2, among="layer.*").bind(make_blocks()).names == BLOCK_NAMES[1:6]
