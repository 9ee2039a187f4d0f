"""MISA: its draws, its importance, and training of matrices."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from policy_support import BLOCK_NAMES, make_blocks, take_step
from tiny_models import tiny_batch, tiny_llama

import gradselect as gs
from gradselect.policies.misa import MISA, within

NORMS = dict.fromkeys(BLOCK_NAMES, 1.0)


def test_a_draw_ends_before_the_limit_is_passed() -> None:
    sizes = {"a": 3, "b": 4, "c": 2}
    assert within(["a", "b", "c"], sizes, limit=7) == {"a", "b"}
    assert within(["a", "b", "c"], sizes, limit=6.9) == {"a"}
    assert within(["b", "a", "c"], sizes, limit=1) == {"b"}
    assert within(["a", "b", "c"], sizes, limit=9) == {"a", "b", "c"}


def test_a_period_keeps_its_draw_and_the_next_draws_anew() -> None:
    policy = MISA(share=0.3, every=4).bind(make_blocks())
    selections = [take_step(policy, step, NORMS) for step in range(40)]
    periods = [selections[start : start + 4] for start in range(0, 40, 4)]
    assert all(len(set(period)) == 1 for period in periods)
    assert len({period[0] for period in periods}) > 3


def test_importance_is_the_mean_square_of_the_gradient_over_a_period() -> None:
    policy = MISA(share=0.01, every=2, ema=0.75).bind(make_blocks())
    (name,) = take_step(policy, 0, dict.fromkeys(BLOCK_NAMES, 3.0))
    assert set(policy.importance.values()) == {0.0}
    take_step(policy, 1, dict.fromkeys(BLOCK_NAMES, 5.0))
    first = (9 + 25) / 2 / policy.num_elements[name]
    assert policy.importance == {block: first if block == name else 0.0 for block in BLOCK_NAMES}
    for step in (3, 5):  # each ends a period whose first step had no gradient
        policy.commit(step, [name], {name: 2.0})
    second = 0.75 * first + 0.25 * 4 / 2 / policy.num_elements[name]
    third = 0.75 * second + 0.25 * 4 / 2 / policy.num_elements[name]
    assert policy.importance[name] == pytest.approx(third)


def test_a_gradient_that_is_not_finite_teaches_nothing() -> None:
    policy = MISA(share=1.0, every=1).bind(make_blocks())
    take_step(policy, 0, NORMS | {"norm": math.nan, "embedding": math.inf})
    assert policy.importance["norm"] == policy.importance["embedding"] == 0.0
    assert policy.importance["layer.0"] > 0


def test_the_draw_follows_the_published_probabilities() -> None:
    """Only the first block of the draw: softmax(eta G / mean G), where a block that has not trained has the mean."""
    policy = MISA(share=0.01, every=1, eta=0.5, seed=1).bind(make_blocks(BLOCK_NAMES[:3]))
    policy.importance = dict(zip(policy.names, (0.0, 1.0, 5.0), strict=True))
    counts = Counter(policy.propose(step)[0] for step in range(4000))
    weights = {name: math.exp(0.5 * (value or 3.0) / 3.0) for name, value in policy.importance.items()}
    for name, weight in weights.items():
        share = weight / sum(weights.values())
        # Four standard deviations.
        assert abs(counts[name] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def test_blocks_whose_gradients_are_alike_are_drawn_alike() -> None:
    """Blocks without a known importance had 0, far below the others: the first that were drawn trained for ever."""
    policy = MISA(share=0.01, every=1).bind(make_blocks())
    norms = {name: math.sqrt(policy.num_elements[name]) for name in policy.names}
    counts = Counter(take_step(policy, step, norms)[0] for step in range(600))
    share = 1 / len(policy.names)
    # Four standard deviations.
    limit = 4 * math.sqrt(600 * share * (1 - share))
    assert all(abs(counts[name] - 600 * share) < limit for name in policy.names)


def test_the_draw_does_not_depend_on_the_scale_of_the_loss() -> None:
    def selections(scale: float) -> list[tuple[str, ...]]:
        policy = MISA(share=0.3, every=2).bind(make_blocks())
        norms = {name: scale * (place + 1) for place, name in enumerate(BLOCK_NAMES)}
        return [take_step(policy, step, norms) for step in range(40)]

    assert selections(1.0) == selections(1024.0)


def test_matrices_train_alone_and_their_state_is_cleared_after_the_period() -> None:
    model = tiny_llama()
    blocks = gs.partition(model, by="matrix")
    optimizer = gs.BlockOptimizer(
        model, MISA(share=0.1, every=2, among=("layer.*.*.*",)), blocks=blocks, residency=gs.Drop(), lr=1e-2
    )
    sizes = {block.name: block.num_elements for block in blocks}
    matrices = {name for name in sizes if name.count(".") == 3}
    batch = tiny_batch(model, seed=0)
    seen = set()
    for _ in range(12):
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        record = optimizer.last_record
        assert record is not None
        selected = set(record.selected)
        seen |= selected
        assert selected <= matrices
        assert len(selected) == 1 or sum(sizes[name] for name in selected) <= 0.1 * sum(sizes[n] for n in matrices)
        trained = {name for block in blocks if block.name in selected for name in block.parameter_names}
        changed = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
        assert changed == trained
        assert record.state_bytes == 8 * sum(sizes[name] for name in selected)
    assert len(seen) > 2
    memory = optimizer.memory()
    assert memory["state_on_host"] == 0


def test_ema_of_one_is_refused_with_what_to_write() -> None:
    with pytest.raises(gs.UsageError, match=r"write ema=0\.9"):
        MISA(ema=1.0)
