"""LoSiA: importance and its uncertainty, slots of layers, and gradients that are looked at and not applied."""

from __future__ import annotations

import math

import pytest
import torch
from policy_support import make_blocks, take_step
from slice_support import LAYERS, SLICED, in_layer, train
from test_stratified import NORMS, by_matrix
from tiny_models import tiny_batch, tiny_llama

import gradselect as gs


def bound(**settings):
    return gs.LoSiA(**{"count": 2, "every": 3, "among": ("layer.*.*.*",)} | settings).bind(make_blocks(SLICED))


def norms_at(step):
    return {name: (1 + place % 5) * 10 + (7 * place * (step + 1)) % 13 for place, name in enumerate(SLICED)}


def test_layers_take_turns_and_only_the_one_whose_slot_it_is_is_looked_at():
    policy = bound()
    for step in range(24):
        layer = step // 3 % LAYERS
        assert list(policy.observed(step)) == in_layer(layer, SLICED)
        before = policy.propose(step)
        take_step(policy, step, norms_at(step))
        after = policy.propose(step + 1)
        for other in range(LAYERS):
            may_change = other == layer and step % 3 == 2
            assert may_change or in_layer(other, before) == in_layer(other, after)


def test_a_slot_selects_by_importance_times_uncertainty_and_forgets_them():
    """The twin writes the paper's formulas for one slice after the other."""
    policy = bound(every=4, ema=0.85)
    for slot in range(6):
        average, uncertainty = dict.fromkeys(SLICED, 0.0), dict.fromkeys(SLICED, 0.0)
        observed = policy.observed(4 * slot)
        for step in range(4 * slot, 4 * slot + 4):
            q = norms_at(step)
            for name in observed:
                average[name] = 0.85 * average[name] + 0.15 * q[name]
                uncertainty[name] = 0.85 * uncertainty[name] + 0.15 * abs(q[name] - average[name])
            take_step(policy, step, q)
            if step % 4 < 3:
                assert policy.importance == pytest.approx({name: average[name] for name in observed})
                assert policy.uncertainty == pytest.approx({name: uncertainty[name] for name in observed})
        best = sorted(observed, key=lambda name: -average[name] * uncertainty[name])[:2]
        assert set(policy.propose(4 * slot + 4)).intersection(observed) == set(best)
        assert policy.importance == policy.uncertainty == {}


def test_another_seed_starts_with_other_slices():
    assert len({bound(seed=seed).propose(0) for seed in range(4)}) == 4


@pytest.mark.parametrize("nothing", [math.nan, 0.0])
def test_a_gradient_that_is_zero_or_not_finite_teaches_nothing(nothing):
    policy = bound(every=2)
    first = policy.propose(0)
    for step in range(2):
        take_step(policy, step, dict.fromkeys(SLICED, nothing))
    assert policy.propose(2) == first
    take_step(policy, 2, NORMS | {"layer.1.columns.0": math.inf})
    assert "layer.1.columns.0" not in policy.importance
    assert len(policy.importance) == 7


def test_every_layer_trains_its_share_while_another_is_looked_at():
    policy = bound(fraction=0.25, count=None)
    for step in range(30):
        assert [len(in_layer(layer, take_step(policy, step, norms_at(step)))) for layer in range(LAYERS)] == [2] * 3


def test_a_block_that_drops_out_is_replaced_and_no_other_selection_changes():
    policy = bound()
    selected = policy.propose(0)
    policy.candidates = tuple(block for block in policy.candidates if block.name != selected[0])
    replaced = policy.propose(1)
    assert set(selected[1:]) < set(replaced)
    assert len(replaced) == len(selected)


OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"update_in_backward": True}, {"residency": gs.Offload()}],
    ids=["plain", "in backward", "offload"],
)


def runs_beside_each_other(options, *, by, dtype=torch.float32):
    """Yield LoSiA's record, its model, and one in which the slices that it drew are a fixed selection."""
    model, twin = tiny_llama(dtype=dtype), tiny_llama(dtype=dtype)
    policy = gs.LoSiA(count=2, every=6, among=("layer.*.*.*",))
    optimizer = gs.BlockOptimizer(model, policy, blocks=gs.partition(model, by=by), lr=1e-2, **options)
    selected = optimizer.policy.propose(0)
    fixed = gs.BlockOptimizer(twin, gs.Fixed(selected), blocks=gs.partition(twin, by=by), lr=1e-2, **options)
    for record, _ in zip(train(model, optimizer, range(6)), train(twin, fixed, range(6)), strict=True):
        assert record.selected == selected
        assert not record.explored
        yield record, model, twin
    assert optimizer.memory()["gradients"] == 0
    (record,) = train(model, optimizer, range(6, 7))
    assert all(name.startswith("layer.1.") for name in record.norms)


@OPTIONS
def test_looking_at_gradients_changes_no_bit_of_the_training(options):
    for record, model, twin in runs_beside_each_other(options, by="matrix"):
        assert sorted(record.norms) == sorted(name for name in record.norms if name.startswith("layer.0."))
        assert len(record.norms) == 7
        assert record.measure == "taylor"
        assert all(map(torch.equal, model.parameters(), twin.parameters()))


@OPTIONS
def test_looking_at_slices_changes_the_training_by_rounding_only(options):
    """In float64: the gradients of all slices are one product, that of one slice is a smaller one."""
    for record, model, twin in runs_beside_each_other(options, by="columns", dtype=torch.float64):
        assert len(record.norms) == 8
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_norms_are_those_of_the_whole_window_and_gradients_of_unselected_blocks_are_gone_at_its_end(passes, scaled):
    model = tiny_llama()
    blocks = gs.partition(model, by="matrix")
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0) if scaled else None
    policy = gs.LoSiA(count=2, every=6, among=("layer.*.*.*",))
    optimizer = by_matrix(model, policy, accumulation_steps=passes, grad_scaler=scaler)
    twin = tiny_llama()
    for number in range(passes):
        loss = model(**tiny_batch(model, seed=number)).loss
        (loss if scaler is None else scaler.scale(loss)).backward()
        twin(**tiny_batch(twin, seed=number)).loss.backward()
    selected = optimizer.policy.propose(0)
    held = {block.name for block in blocks if any(each.grad is not None for each in block.parameters)}
    assert held == set(selected)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
    expected = {
        block.name: sum(float((each.detach() * each.grad).abs().sum()) for each in block.parameters)
        for block in gs.partition(twin, by="matrix")
        if block.name.startswith("layer.0.") and block.name.count(".") == 3
    }
    assert optimizer.last_record.norms == pytest.approx(expected, rel=1e-4)
