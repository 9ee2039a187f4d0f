"""Stratified selection: strata from names, shares of each stratum, their orders, and training with them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from policy_support import make_blocks, take_step
from resume_support import assert_resumes
from slice_support import LAYERS, SLICED, SLICES, in_layer, train
from tiny_models import tiny_batch, tiny_llama, tiny_t5

import gradselect as gs
from gradselect.policies.strata import strata_of
from gradselect.reference import SelectiveAdamW

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MATRICES = (
    "embedding",
    *(f"layer.{layer}.{rest}" for layer in range(4) for rest in (*ATTENTION, *MLP, "vectors")),
    "norm",
)
NORMS = {name: float(place % 11) + 0.5 for place, name in enumerate(dict.fromkeys((*SLICED, *MATRICES)))}


def bound(names=SLICED, kind=gs.Stratified, **settings):
    return kind(**settings).bind(make_blocks(names))


@pytest.mark.parametrize(
    ("by", "name", "stratum"),
    [
        ("layer", "layer.1.columns.3", "layer.1.columns"),
        ("layer", "layer.1.rows.3", "layer.1.rows"),
        ("layer", "layer.1.self_attn.q_proj", "layer.1.matrices"),
        ("layer", "layer.1.vectors", "layer.1.vectors"),
        ("layer", "layer.1", "layer.1"),
        ("layer", "vision_tower.layer.1.columns.0", "vision_tower.layer.1.columns"),
        ("layer", "embedding", "embedding"),
        ("layer", "decoder.layer.1.layer.0.SelfAttention.relative_attention_bias", "decoder.layer.1.matrices"),
        ("category", "layer.1.columns.3", "layer.1.columns"),
        ("category", "layer.1.self_attn.q_proj", "layer.1.self_attn"),
        ("category", "decoder.layer.1.layer.1.EncDecAttention.q", "decoder.layer.1.EncDecAttention"),
        ("category", "layer.1.mlp.experts.down_proj", "layer.1.mlp"),
        ("category", "layer.1.fc1", "layer.1.matrices"),
        ("category", "layer.1.vectors", "layer.*.vectors"),
        ("category", "layer.1", "layer.*"),
        ("category", "vision_tower.layer.1.vectors", "vision_tower.layer.*.vectors"),
        ("category", "layer.1.intermediate.dense", "layer.*.intermediate"),
        ("category", "head", "head"),
    ],
)
def test_the_stratum_of_a_block_follows_from_the_structure_of_its_name(by, name, stratum):
    same_layer = {
        "layer.1.self_attn.q_proj": ("layer.1.self_attn.k_proj",),
        "layer.1.mlp.experts.down_proj": ("layer.1.mlp.gate",),
        "layer.1.fc1": ("layer.1.fc2",),
        "layer.1.columns.3": ("layer.1.columns.4",),
        "decoder.layer.1.layer.1.EncDecAttention.q": ("decoder.layer.1.layer.1.EncDecAttention.k",),
    }
    names = (name, *same_layer.get(name, ()))
    assert strata_of(names, by, None, 1).of[name] == stratum


def test_the_sublayers_of_t5_are_no_layers():
    names = tuple(block.name for block in gs.partition(tiny_t5(layers=2), by="matrix"))
    strata = strata_of(names, "layer", 0.5, None)
    layers = [f"{side}.layer.{number}" for side in ("encoder", "decoder") for number in range(2)]
    assert {stratum for stratum in strata.members if stratum.endswith(".matrices")} == {f"{x}.matrices" for x in layers}


def test_a_block_whose_layer_has_no_other_of_its_category_stands_with_those_of_all_layers():
    strata = strata_of(MATRICES, "category", 0.5, None)
    assert strata.members["layer.*.vectors"] == tuple(f"layer.{layer}.vectors" for layer in range(4))
    assert strata.members["layer.2.mlp"] == tuple(f"layer.2.{rest}" for rest in MLP)


# Shares --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["random", "rotate", "fixed", "norm"])
@pytest.mark.parametrize(("share", "number"), [({"count": 1}, 1), ({"count": 3}, 3), ({"fraction": 0.25}, 2)])
def test_every_layer_trains_exactly_its_share_at_every_step(order, share, number):
    policy = bound(order=order, among=("layer.*.*.*",), **share)
    for step in range(30):
        selected = take_step(policy, step, NORMS)
        assert [len(in_layer(layer, selected)) for layer in range(LAYERS)] == [number] * LAYERS
        assert len(selected) == number * LAYERS


def test_half_of_each_category_is_half_of_the_attention_the_mlp_and_the_norms():
    """HFT: 2 of 4 attention matrices, 1 or 2 of 3 MLP matrices, half of the norms; what stands alone always trains."""
    policy = bound(MATRICES, by="category", fraction=0.5)
    totals = Counter()
    for step in range(16):
        selected = take_step(policy, step, NORMS)
        assert {"embedding", "norm"} <= set(selected)
        assert sum(name.endswith(".vectors") for name in selected) == 2
        for layer in range(4):
            assert sum(name.startswith(f"layer.{layer}.self_attn.") for name in selected) == 2
            totals[layer] += sum(name.startswith(f"layer.{layer}.mlp.") for name in selected)
        assert [sum(name.startswith(f"layer.{layer}.mlp.") for name in selected) for layer in range(4)] in (
            [1, 2, 1, 2],
            [2, 1, 2, 1],
        )
    assert set(totals.values()) == {24}  # half of 3 in each of 16 steps


def test_a_share_below_one_block_takes_one():
    policy = bound(fraction=0.01, among=("layer.*.*.*",))
    assert all(len(take_step(policy, step, NORMS)) == LAYERS for step in range(5))


def test_blocks_outside_the_layers_and_vectors_train_always_unless_among_leaves_them_out():
    selected = take_step(bound(count=1), 0, NORMS)
    assert {"embedding", "norm", "head", *(f"layer.{layer}.vectors" for layer in range(LAYERS))} <= set(selected)
    assert len(selected) == 6 + LAYERS


# Orders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stagger", [True, False])
@pytest.mark.parametrize(("share", "every"), [({"count": 1}, 1), ({"count": 3}, 2), ({"fraction": 0.3}, 1)])
def test_a_rotation_trains_every_slice_within_coverage_steps_and_not_sooner(stagger, share, every):
    policy = bound(order="rotate", every=every, stagger=stagger, among=("layer.*.*.*",), **share)
    window = policy.coverage_steps
    selections = [set(take_step(policy, step, NORMS)) for step in range(6 * window)]
    spans = [set().union(*selections[start : start + window]) for start in range(4 * window)]
    assert all(span == set(policy.names) for span in spans)
    shorter = [set().union(*selections[start : start + window - every]) for start in range(4 * window)]
    assert any(span != set(policy.names) for span in shorter)


def test_a_staggered_rotation_is_one_turn_ahead_in_each_layer_and_an_aligned_one_is_not():
    def parts(step, **settings):
        selected = bound(count=1, order="rotate", every=2, among=("layer.*.*.*",), **settings).propose(step)
        return [int(name.rpartition(".")[2]) for name in selected]

    assert [parts(step) for step in (0, 1, 2, 14, 16)] == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [7, 0, 1], [0, 1, 2]]
    assert [parts(step, stagger=False) for step in (0, 2, 14)] == [[0] * 3, [1] * 3, [7] * 3]


def test_a_fixed_draw_stays_and_another_seed_draws_other_slices():
    draws = set()
    for seed in range(4):
        policy = bound(count=1, order="fixed", among=("layer.*.*.*",), seed=seed)
        selections = {take_step(policy, step, NORMS) for step in range(20)}
        assert len(selections) == 1
        draws |= selections
    assert len(draws) == 4
    assert policy.coverage_steps is None


def test_a_fixed_draw_stays_when_other_blocks_drop_out():
    policy = bound(count=3, order="fixed", among=("layer.*.*.*",))
    selected = policy.propose(0)
    kept = [block for block in policy.candidates if block.name in selected or block.name.endswith(".7")]
    policy.candidates = tuple(kept)
    assert policy.propose(1) == selected


def test_a_random_draw_stays_for_its_steps_and_all_slices_are_equally_likely():
    policy = bound(count=2, every=3, among=("layer.*.*.*",))
    selections = [take_step(policy, step, NORMS) for step in range(3 * 400)]
    assert all(len(set(selections[start : start + 3])) == 1 for start in range(0, 1200, 3))
    counts = Counter(name for selected in selections[::3] for name in selected)
    # Four standard deviations.
    assert all(abs(counts[name] - 100) < 4 * (400 * 0.25 * 0.75) ** 0.5 for name in policy.names)


def test_by_norm_each_layer_selects_its_largest_ones_for_the_steps_until_the_next_look():
    policy = bound(count=2, order="norm", every=3, among=("layer.*.*.*",))
    for step in range(9):
        looks = step % 3 == 0
        assert (policy.propose(step) is None) == looks
        norms = {name: (7.0 * place + step) % 13 for place, name in enumerate(SLICED)}
        selected = take_step(policy, step, norms)
        if looks:
            expected = {
                name
                for layer in range(LAYERS)
                for name in sorted(in_layer(layer, SLICED), key=lambda name: -norms[name])[:2]
            }
        assert set(selected) == expected
    assert policy.expected_explore_steps(9) == 3


def adagradselect(**settings):
    settings = {"strata": "layer", "fraction": 0.25, "explore_steps": 10, "among": ("layer.*.*.*",)} | settings
    return bound(kind=gs.AdaGradSelect, **settings)


def test_adagradselect_in_strata_selects_in_each_layer_by_its_own_rule():
    policy = adagradselect(delta=1000.0)
    first = take_step(policy, 0, NORMS)
    best = {name for layer in range(LAYERS) for name in sorted(in_layer(layer, SLICED), key=lambda n: -NORMS[n])[:2]}
    assert set(first) == best
    drawn = [take_step(policy, step, NORMS) for step in range(1, 60)]
    assert all([len(in_layer(layer, each)) for layer in range(LAYERS)] == [2] * LAYERS for each in drawn)
    assert len(set(drawn[20:])) > 30
    assert {name for each in drawn for name in each} == set(policy.names)


@pytest.mark.parametrize("settings", [{}, {"draw": "multinomial", "rank_by": "step"}, {"coverage": 9, "every": 2}])
def test_adagradselect_with_one_stratum_is_adagradselect(settings):
    def selections(**strata):
        options = {"count": 2, "explore_steps": 20, "delta": 4.0, "seed": 5} | settings | strata
        policy = bound(SLICES[:8], gs.AdaGradSelect, **options)
        return [
            take_step(policy, step, {name: (3 * n * step) % 7 + 1 for n, name in enumerate(SLICED)})
            for step in range(60)
        ]

    assert selections(strata="layer") == selections()


def test_adagradselect_over_all_slices_neglects_layers_of_small_gradient_and_in_strata_does_not():
    """The gradients of layer 2 are a hundredth of those of the others."""
    norms = {name: NORMS[name] * (0.01 if name.startswith("layer.2.") else 1.0) for name in SLICED}

    def trained_in_layer_two(**settings):
        policy = adagradselect(**settings)
        return sum(len(in_layer(2, take_step(policy, step, norms))) for step in range(20))

    assert trained_in_layer_two(strata=None) <= 3
    assert trained_in_layer_two() == 2 * 20


def test_adagradselect_with_few_of_a_layer_locks_in_and_coverage_unlocks_it():
    def slices_after_exploring(**settings):
        policy = adagradselect(**settings)
        drawn = [take_step(policy, step, NORMS) for step in range(100)]
        return {name for selected in drawn[20:] for name in selected}

    assert len(slices_after_exploring()) == 2 * LAYERS
    assert slices_after_exploring(coverage=16) == set(adagradselect().names)


def test_a_checkpoint_of_adagradselect_names_strata_only_if_they_are_used():
    """Older checkpoints do not have the key, and resume."""
    assert "strata" not in gs.AdaGradSelect(explore_steps=3).settings()
    assert gs.AdaGradSelect(explore_steps=3, strata="layer").settings()["strata"] == "layer"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 9}, "count=9 is more than the 8 blocks of the largest stratum; write count=8"),
        ({"count": 1, "among": ("norm", "head")}, 'strata by="layer" hold one block each'),
    ],
)
def test_strata_that_do_not_fit_are_refused_with_what_to_write(settings, message):
    with pytest.raises(gs.UsageError, match=message):
        bound(**settings)


# Training ------------------------------------------------------------------------------------------------------------


def by_matrix(model, policy, **options):
    return gs.BlockOptimizer(model, policy, blocks=gs.partition(model, by="matrix"), lr=1e-2, **options)


RUNS = {
    "random": gs.Stratified(by="category", fraction=0.5),
    "rotate": gs.Stratified(count=2, order="rotate", every=2),
    "fixed": gs.Stratified(count=2, order="fixed", among=("layer.*.*.*",)),
    "norm": gs.Stratified(count=2, order="norm", every=3),
    "adagradselect": gs.AdaGradSelect(count=2, strata="layer", explore_steps=6),
    "losia": gs.LoSiA(count=2, every=2, among=("layer.*.*.*",)),
}


@pytest.mark.parametrize(
    ("policy", "options"),
    [*((policy, {}) for policy in RUNS.values()), (RUNS["losia"], {"residency": gs.Drop()})],
    ids=[*RUNS, "losia, drop"],
)
def test_stopped_at_any_step_it_goes_on_bitwise_alike(policy, options):
    def built(weights):
        model = tiny_llama()
        if weights is not None:
            model.load_state_dict(weights)
        return model, by_matrix(model, policy, **options)

    def step(model, optimizer, number):
        (record,) = train(model, optimizer, [number])
        return record.selected

    assert_resumes(built, step, num_steps=6)


@pytest.mark.parametrize("policy", RUNS.values(), ids=RUNS)
def test_only_what_is_selected_changes(policy):
    model = tiny_llama()
    optimizer = by_matrix(model, policy)
    members = {block.name: block.parameter_names for block in gs.partition(model, by="matrix")}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for record in train(model, optimizer, range(4)):
        changed = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
        assert changed == {name for block in record.selected for name in members[block]}
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("policy", RUNS.values(), ids=RUNS)
def test_it_equals_the_readable_twin(policy):
    """In float64: the twin rounds in another order."""
    model, twin = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    blocks = gs.partition(twin, by="matrix")
    by_hand = SelectiveAdamW(blocks, policy.bind(blocks), lr=1e-2)
    for step, record in enumerate(train(model, by_matrix(model, policy), range(4))):
        twin(**tiny_batch(twin, seed=step)).loss.backward()
        assert by_hand.step() == record.selected
        twin.zero_grad()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_by_norm_at_most_one_gradient_too_many_exists_during_the_backward_pass():
    model = tiny_llama()
    blocks = gs.partition(model, by="matrix")
    most = 0

    def count(_):
        nonlocal most
        held = [block.name for block in blocks if any(parameter.grad is not None for parameter in block.parameters)]
        most = max(most, len(held))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    policy = gs.Stratified(count=2, order="norm", among=("layer.*.*.*",))
    optimizer = gs.BlockOptimizer(model, policy, blocks=blocks, lr=1e-2)
    (record,) = train(model, optimizer, range(1))
    assert record.explored
    assert len(record.selected) < most <= len(record.selected) + 1


@pytest.mark.parametrize("policy", RUNS.values(), ids=RUNS)
def test_a_plan_is_made_for_it(policy):
    model = tiny_llama()
    blocks = gs.partition(model, by="matrix")
    made = gs.plan(model, policy, batch_size=2, sequence_length=8, blocks=blocks)
    assert 0 < min(step.relative_time for step in made.steps) <= 1


@pytest.mark.parametrize("nothing", [0.0, float("nan")])
def test_a_selection_by_gradients_that_are_all_zero_or_not_finite_is_made_again(nothing):
    policy = bound(order="norm", fraction=0.25, every=5)
    looks = []
    for step in range(5):
        looks += [step] if policy.propose(step) is None else []
        selected = take_step(policy, step, dict.fromkeys(SLICED, nothing) if step < 2 else NORMS)
    assert looks == [0, 1, 2]
    other = bound(order="norm", fraction=0.25)
    assert selected == take_step(other, 0, NORMS)
