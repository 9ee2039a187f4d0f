"""CostAware: how deep steps go, what they train, and that its speed-up is the planned one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from policy_support import BLOCK_NAMES, make_blocks, norms_at, take_step
from resume_support import assert_resumes
from slice_support import train
from tiny_models import tiny_batch, tiny_llama, tiny_qwen2, tiny_t5
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gradselect as gs
from gradselect.blocks import StepCost
from gradselect.planning import survey_policy
from gradselect.policies import AdaGradSelect, CostAware
from gradselect.reference import SelectiveAdamW

SETTINGS = {"count": 2, "explore_steps": 12, "full_every": 4, "gain": "l1", "among": None}


def bound(model: nn.Module | None = None, **settings: object) -> CostAware:
    policy = CostAware(**SETTINGS | settings)  # type: ignore[arg-type]
    if model is None:
        return policy.bind(make_blocks())
    blocks = gs.partition(model)
    return policy.bind(blocks, cost=StepCost.of_model(model, blocks))


def selections(policy: CostAware, *, steps: int = 800, norm: float = 1.0) -> list[tuple[str, ...] | None]:
    """Proposals of a run in which all norms are equal; None where it explores."""
    norms = dict.fromkeys(policy.names, norm)
    found = []
    for step in range(steps):
        proposal = policy.propose(step)
        found.append(proposal)
        selected = policy.decide(step, norms) if proposal is None else proposal
        policy.commit(step, selected, norms if proposal is None else {})
    return found


# --- the rule -------------------------------------------------------------------------------------------


def test_it_explores_when_adagradselect_does() -> None:
    policy, other = (kind(count=2, explore_steps=30, seed=4).bind(make_blocks()) for kind in (CostAware, AdaGradSelect))
    assert [policy.propose(step) is None for step in range(60)] == [other.propose(step) is None for step in range(60)]


def test_it_selects_from_the_layers_by_default_as_adagradselect_does() -> None:
    policy, other = (kind(count=2).bind(make_blocks()) for kind in (CostAware, AdaGradSelect))
    assert policy.names == other.names == BLOCK_NAMES[1:-1]


def test_chances_of_cuts_follow_the_formula() -> None:
    """By hand, for blocks of 1, 4, ..., 49 entries: embedding, layer.0 to layer.4, norm."""
    policy = bound(count=2, floor=0.2)
    counts = dict(zip(BLOCK_NAMES, (1.0, 0.0, 2.0, 0.0, 1.0, 3.0, 0.0), strict=True))
    gains = dict(zip(BLOCK_NAMES, (9.0, 2.0, 1.0, 4.0, 3.0, 2.0, 0.5), strict=True))
    policy.load_state(policy.state() | {"counts": counts, "gains": gains})
    rates = {}
    for cut in range(1, 6):
        above = BLOCK_NAMES[cut:]
        weights = {name: counts[name] + 1 for name in above}
        chance = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        sizes = {name: (place + 1) ** 2 for place, name in enumerate(BLOCK_NAMES) if name in above}
        gain = gains[above[0]] + sum(chance[name] * gains[name] for name in above)
        entries = sizes[above[0]] + sum(chance[name] * sizes[name] for name in above)
        inputs = sum(sizes.values())
        total = sum((place + 1) ** 2 for place in range(1, 7))
        rates[above[0]] = gain / ((2 * total + 2 * inputs + 2 * entries) / (6 * total))
    expected = {name: 0.2 / 5 + 0.8 * rate / sum(rates.values()) for name, rate in rates.items()}
    assert policy.cut_chances() == pytest.approx(expected)
    assert sum(expected.values()) == pytest.approx(1)


def test_a_cut_that_leaves_too_few_blocks_is_not_drawn() -> None:
    assert list(bound(count=2).cut_chances()) == [f"layer.{number}" for number in range(5)]
    assert list(bound(count=4).cut_chances()) == ["layer.0", "layer.1", "layer.2"]
    assert list(bound(count=7).cut_chances()) == []


def test_every_step_trains_as_many_blocks_and_none_below_its_cut() -> None:
    policy = bound(full_every=3)
    for step, selected in enumerate(selections(policy)):
        assert selected is None or len(selected) == 2
        if selected is not None and step % 3 != 2:
            assert "embedding" not in selected


def test_a_deep_block_of_large_gain_trains_whenever_a_step_goes_so_deep() -> None:
    """Equal norms, of which explore steps take the first: the embedding and the lowest layer."""
    steps = selections(bound(full_every=3, explore_steps=60))
    full = [selected for step, selected in enumerate(steps) if step % 3 == 2 and selected is not None]
    assert full.count(("embedding", "layer.0")) > 0.9 * len(full)


def test_every_step_trains_a_block_of_its_cut() -> None:
    """So the shares of depths are the chances of cuts, and a layer trains at least floor / C of the steps."""
    policy = bound(full_every=4, floor=1.0)
    lowest = Counter(
        selected[0] for step, selected in enumerate(selections(policy, steps=1200)) if selected and step % 4 != 3
    )
    assert set(lowest) == {f"layer.{number}" for number in range(5)}
    assert max(lowest.values()) < 1.35 * min(lowest.values())


def test_drawing_a_block_more_often_does_not_make_its_draw_likelier() -> None:
    """Without counts full steps draw evenly, after 800 steps as at the beginning; half of them train the embedding."""
    policy = bound(explore_steps=1, delta=1e6, full_every=2)
    steps = [selected for step, selected in enumerate(selections(policy)) if selected and step % 2 == 1]
    counts = Counter(name for selected in steps for name in selected)
    assert max(counts[f"layer.{number}"] for number in (1, 2, 3, 4)) < 1.5 * min(counts.values())


def test_steps_go_less_deep_than_even_draws() -> None:
    model = tiny_qwen2(layers=8)
    cost = StepCost.of_model(model, gs.partition(model))
    times = {}
    for policy in (CostAware(count=3, full_every=4, among=None), gs.Uniform(count=3)):
        found = survey_policy(policy, gs.partition(model), (), cost=cost)
        times[type(policy)] = sum(cost.relative_time(each) * number for each, number in found.times.items()) / sum(
            found.times.values()
        )
    assert times[CostAware] < 0.97 * times[gs.Uniform]


def test_only_explore_steps_count_for_the_draw() -> None:
    policy = bound()
    steps = selections(policy)
    assert sum(policy.counts.values()) == 2 * sum(selected is None for selected in steps)


def test_a_cut_of_more_gain_is_drawn_more_often_and_the_floor_keeps_the_others() -> None:
    policy = bound(floor=0.5)
    gains = dict.fromkeys(BLOCK_NAMES, 0.0) | {"layer.0": 1.0}
    policy.load_state(policy.state() | {"gains": gains})
    chances = policy.cut_chances()
    assert chances["layer.0"] == pytest.approx(0.6)
    assert [chances[f"layer.{number}"] for number in (1, 2, 3, 4)] == pytest.approx([0.1] * 4)


@pytest.mark.parametrize("nothing", [0.0, float("nan")])
def test_gradients_that_are_all_zero_or_not_finite_count_for_no_block(nothing: float) -> None:
    policy = bound()
    take_step(policy, 0, dict.fromkeys(policy.names, nothing))
    assert set(policy.counts.values()) == {0.0}


@pytest.mark.parametrize(("gain", "expected"), [("l1", 3.0), ("l2", 9.0)])
def test_gain_is_the_l1_norm_or_the_square_of_the_l2_norm(gain: str, expected: float) -> None:
    policy = bound(gain=gain)
    assert policy.measured() == gain
    policy.commit(0, ("layer.1",), dict.fromkeys(policy.names, 3.0) | {"layer.2": float("nan")})
    assert (policy.gains["layer.1"], policy.gains["layer.2"]) == (expected, 0.0)
    assert policy.score(1, "layer.1", 3.0) == 2 * expected
    assert policy.score(1, "layer.1", float("inf")) == -float("inf")


# --- partitions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [{"by": "layer"}, {"by": "matrix"}, {"by": "columns", "parts": 4}])
def test_partitions_of_every_kind_have_a_cut_for_each_layer(by: dict[str, object]) -> None:
    model = tiny_llama(layers=4)
    blocks = gs.partition(model, **by)  # type: ignore[arg-type]
    cost = StepCost.of_model(model, blocks)
    policy = CostAware(fraction=0.25, explore_steps=4).bind(blocks, cost=cost)
    cuts = list(policy.cut_chances())
    layers = {cost.depths[block.name].unit for block in blocks if block.name.startswith("layer.")}
    assert layers <= {cost.depths[name].unit for name in cuts}
    assert len(cuts) == 4
    trained = {name for selected in selections(policy) if selected is not None for name in selected}
    assert trained == set(policy.names)


def test_both_stacks_of_an_encoder_and_a_decoder_are_one_row_of_layers() -> None:
    model = tiny_t5(layers=2)
    policy = bound(model, count=1)
    assert [name.rpartition(".layer")[0] for name in policy.cut_chances()] == ["encoder"] * 2 + ["decoder"] * 2


def test_blocks_without_layers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    blocks = gs.partition(model, patterns={"first": "0.*", "second": "2.*"})
    with pytest.raises(gs.UsageError, match=r"none of its 2 blocks is in a layer \(second, first\)"):
        gs.BlockOptimizer(model, CostAware(), blocks=blocks)
    with pytest.raises(gs.UsageError, match="none of its 1 blocks is in a layer"):
        CostAware(among=("embedding",)).bind(make_blocks())


# --- training -------------------------------------------------------------------------------------------


def counted(model: nn.Module, *, seed: int) -> float:
    """FLOPs per token of the linear layers' products in a forward and a backward pass."""
    batch = tiny_batch(model, seed=seed)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(each, 0) for each in (torch.ops.aten.mm, torch.ops.aten.addmm)) / batch["input_ids"].numel()


def backward(model: nn.Module, *, seed: int) -> None:
    model(**tiny_batch(model, seed=seed)).loss.backward()


def test_gradients_that_are_all_zero_count_for_no_block() -> None:
    policy = bound(count=1, explore_steps=100, epsilon_end=1.0)
    for step in range(3):
        take_step(policy, step, dict.fromkeys(policy.names, 0.0))
    assert not any(policy.counts.values())
    take_step(policy, 3, dict.fromkeys(policy.names, 0.0) | {policy.names[-1]: 1.0})
    assert {name for name, count in policy.counts.items() if count} == {policy.names[-1]}


@pytest.mark.parametrize("tied", [False, True])
def test_the_steps_of_a_run_take_the_flops_of_the_plan(tied: bool) -> None:
    """Each step exactly, by its selection; the mean of exploit steps within 6 %: the plan does not know the gains."""
    model = tiny_llama(layers=3, tied=tied)
    policy = CostAware(count=2, explore_steps=8, among=None)
    planned = gs.plan(model, policy, batch_size=2, sequence_length=8)
    cost = StepCost.of_model(model, gs.partition(model))
    optimizer = gs.BlockOptimizer(model, policy, lr=1e-3)
    exploit, explore = [], []
    for step in range(120):
        is_counted = step < 16 or step % 8 == 0
        flops = counted(model, seed=step) if is_counted else backward(model, seed=step)
        optimizer.step()
        optimizer.zero_grad()
        record = optimizer.last_record
        assert record is not None
        trained = optimizer.blocks if record.explored else record.selected
        relative = cost.relative_time(trained)
        assert flops is None or flops == pytest.approx(relative * cost.full)
        (explore if record.explored else exploit).append(relative)
    assert set(explore) == {planned.step("explore").relative_time} == {1.0}
    assert sum(exploit) / len(exploit) == pytest.approx(planned.relative_time, rel=0.06)
    assert planned.relative_time < 0.85


def test_gradients_are_exact_and_decisions_those_of_whole_gradients() -> None:
    """In fp64 against the readable twin, which computes every gradient."""
    model, twin = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    policy = CostAware(count=2, explore_steps=6)
    optimizer = gs.BlockOptimizer(model, policy, lr=1e-2)
    blocks = gs.partition(twin)
    by_hand = SelectiveAdamW(blocks, policy.bind(blocks, cost=StepCost.of_model(twin, blocks)), lr=1e-2)
    for step in range(14):
        for each in (model, twin):
            each(**tiny_batch(each, seed=step)).loss.backward()
        optimizer.step()
        assert optimizer.last_record is not None
        assert optimizer.last_record.selected == by_hand.step()
        optimizer.zero_grad()
        twin.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, twin.get_parameter(name), atol=1e-10)


def test_stopped_at_any_step_it_resumes_bitwise() -> None:
    def built(weights: dict[str, Tensor] | None) -> tuple[nn.Module, gs.BlockOptimizer]:
        model = tiny_llama()
        if weights is not None:
            model.load_state_dict(weights)
        return model, gs.BlockOptimizer(model, CostAware(count=2, explore_steps=5, full_every=3), lr=1e-2)

    def step(model: nn.Module, optimizer: gs.BlockOptimizer, number: int) -> list[gs.StepRecord]:
        return list(train(model, optimizer, [number]))

    assert_resumes(built, step, num_steps=10)


def test_norms_beyond_the_selection_change_nothing() -> None:
    """An exploit step is no observation, whatever it is told."""
    policy = bound()
    before = policy.state()["gains"]
    step = next(step for step in range(60) if policy.propose(step) is not None)
    policy.commit(step, ("layer.1", "layer.2"), norms_at(step))
    assert policy.state()["gains"] == before
