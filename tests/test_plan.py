"""`gs.plan`: bytes and time of steps, against those of optimizers that were run."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_batch, tiny_llama
from torch import nn

import gradselect as gs
from gradselect.blocks import StepCost
from gradselect.core import MEMORY_CATEGORIES
from gradselect.entries.set_up import trainable_tensors
from gradselect.masks.calibration import Probe, batch_of_ones
from gradselect.planning import CATEGORIES, Plan
from gradselect.planning.policy_survey import mean_by_lowest, mean_sum, survey

# Weights, gradients, masters, state ---------------------------------------------------------------------------------

NUM_STEPS = 10


def run_blocks(model: nn.Module, policy: gs.AbstractPolicy, **options: Any) -> list[dict[str, int]]:
    """Return `memory()` before each update, when the meter of a training reads it."""
    optimizer = gs.BlockOptimizer(model, policy, **options)
    seen = []
    for step in range(NUM_STEPS):
        model(**tiny_batch(model, seed=step)).loss.backward()
        seen.append(dict(optimizer.memory()))
        optimizer.step()
        optimizer.zero_grad()
    return seen


def of(found: Plan, name: str) -> int:
    """Return the planned bytes of a category at the update, the moment of the meter."""
    return max(getattr(step.moments["update"], name) for step in found.steps)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_gradients_of_an_update_in_the_backward_pass_have_the_dtypes_of_their_weights() -> None:
    """Of fp32 adapters on a bf16 base, every gradient counted as bf16."""
    model = get_peft_model(tiny_llama().to(torch.bfloat16), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    adapters = [weight for weight in model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in adapters} == {torch.float32}
    found = gs.plan(model, gs.Uniform(count=1), batch_size=2, sequence_length=8, update_in_backward=True)
    assert found.bytes.gradients == max(4 * weight.numel() for weight in adapters)


RESIDENCIES = {"keep": gs.Keep(), "offload": gs.Offload(), "drop": gs.Drop()}
POLICIES = {
    "all": gs.All(),
    "fixed": gs.Fixed(("layer.1", "layer.2")),
    "adagradselect": gs.AdaGradSelect(count=2, explore_steps=4, among=("layer.*",)),
    "gradient norm": gs.GradNormTopK(count=2, among=("layer.*",)),
    "uniform": gs.Uniform(count=2, among=("layer.*",)),
    "lisa": gs.Uniform(count=2, every=2, among=("layer.*",)),
    "cyclic": gs.Cyclic(every=2, among=("layer.*",)),
}


@pytest.mark.parametrize(
    ("residency", "dtype"), [("keep", torch.float32), ("offload", torch.bfloat16), ("drop", torch.float32)]
)
@pytest.mark.parametrize("name", POLICIES)
def test_bytes_of_equal_blocks_are_exact(name: str, residency: str, dtype: torch.dtype) -> None:
    """A few steps reach them. On the host the plan is a limit."""
    always = ("embedding", "norm") if name == "lisa" else ()
    options: dict[str, Any] = {"always": always, "residency": RESIDENCIES[residency]}
    found = gs.plan(tiny_llama(dtype=dtype, tied=True), POLICIES[name], batch_size=2, sequence_length=8, **options)
    seen = run_blocks(tiny_llama(dtype=dtype, tied=True), POLICIES[name], **options)
    for category in ("weights", "gradients"):
        assert max(each[category] for each in seen) == of(found, category)
    state = ("masters", "state_on_device")
    comes_everywhere = name not in ("adagradselect", "gradient norm")
    if (residency == "keep" and comes_everywhere) or name in ("all", "fixed"):
        assert all(max(each[category] for each in seen) == of(found, category) for category in state)
    assert all(each[category] <= of(found, category) for each in seen for category in state)
    assert max(each["state_on_host"] for each in seen) <= of(found, "state_on_host")


def test_a_cycle_of_single_blocks_reaches_the_planned_state_on_the_host() -> None:
    policy, residency = gs.Cyclic(every=1, order="descending"), gs.Offload()
    found = gs.plan(tiny_llama(), policy, batch_size=2, sequence_length=8, residency=residency)
    seen = run_blocks(tiny_llama(), policy, residency=residency)
    assert max(each["state_on_host"] for each in seen) == of(found, "state_on_host")


@pytest.mark.parametrize("policy", [gs.AdaGradSelect(fraction=0.5, explore_steps=4), gs.Uniform(count=3), gs.MISA()])
def test_no_run_exceeds_the_plan(policy: gs.AbstractPolicy) -> None:
    """The plan takes the largest blocks."""
    model = tiny_llama()
    found = gs.plan(model, policy, batch_size=2, sequence_length=8, residency=gs.Offload())
    for seen in run_blocks(model, policy, residency=gs.Offload()):
        assert all(count <= of(found, category) for category, count in seen.items())


def test_in_explore_steps_one_block_more_than_is_kept_has_gradients() -> None:
    policy = gs.GradNormTopK(count=2, among=("layer.*",))
    step = gs.plan(tiny_llama(), policy, batch_size=2, sequence_length=8).step("explore")
    assert step.moments["backward"].gradients * 2 == step.moments["update"].gradients * 3


def test_with_accumulation_all_gradients_of_an_explore_step_add_up() -> None:
    policy, sizes = gs.AdaGradSelect(count=1, among=None), {"batch_size": 2, "sequence_length": 8}
    found = gs.plan(tiny_llama(), policy, accumulation_steps=2, **sizes)
    assert found.step("explore").moments["loss"].gradients == found.bytes.weights
    assert gs.plan(tiny_llama(), policy, **sizes).step("explore").moments["loss"].gradients == 0


MASKS = {
    "id3": gs.ID3(budget=500, steps=4),
    "static": gs.StaticMask(density=0.05),
    "static by tensor": gs.StaticMask(salience=gs.salience.magnitude, budget=333, scope="tensor"),
    "static, refreshed": gs.StaticMask(salience=gs.salience.random, density=0.05, refresh_every=5),
    "lift": gs.LIFT(density=0.05, refresh_every=9),
    "bitfit": gs.BitFit(among=("*norm*",)),
    "top gradient": gs.TopGradient(density=0.05),
    "gmt": gs.GMT(),
}


def live_bytes() -> int:
    """Return the bytes of the numbers in all tensors that Python can reach, each storage once, without single ones."""
    gc.collect()
    tensors = [
        each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.layout == torch.strided
    ]
    storages = [each.untyped_storage() for each in tensors if each.is_floating_point() and each.ndim]
    return sum({each.data_ptr(): each.nbytes() for each in storages if each.device.type == "cpu"}.values())


def watch_derivatives(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets `live_bytes` after each derivative of a look."""
    seen, derivatives = list[int](), Probe.derivatives

    def watched(self: Probe, value: torch.Tensor, leaves: Any) -> Any:
        slopes = derivatives(self, value, leaves)
        seen.append(live_bytes())
        return slopes

    monkeypatch.setattr(Probe, "derivatives", watched)
    return seen


LOOKS = {
    "synflow, ones": (gs.salience.synflow, 0),
    "synflow": (gs.salience.synflow, 2),
    "snip": (gs.salience.snip, 2),
    "snip, one batch": (gs.salience.snip, 1),
    "grasp": (gs.salience.grasp, 2),
    "grasp, one batch": (gs.salience.grasp, 1),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_holds_the_planned_copies_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion, num_batches = LOOKS[name]
    model = tiny_llama()
    batches = [tiny_batch(model, seed=seed) for seed in range(num_batches)] or None
    found = gs.plan(
        model,
        gs.StaticMask(salience=criterion, density=0.05, batches=batches),
        batch_size=2,
        sequence_length=8,
        gradient_checkpointing=True,  # which a model in evaluation mode does not do
    )
    look = found.step("look")
    tensors = trainable_tensors(model)
    probe = Probe(model=model, tensors=tensors, batches=batches or [batch_of_ones(model)])
    seen = watch_derivatives(monkeypatch)
    before = live_bytes()
    criterion.estimate(probe)
    planned = look.moments["update"]
    assert max(seen) - before == planned.workspace + planned.gradients
    assert planned.weights == sum(tensor.parameter.numel() * 4 for tensor in tensors)
    plain = gs.plan(
        model, gs.StaticMask(salience=gs.salience.snip, density=0.05, batches=[{}]), batch_size=2, sequence_length=8
    )
    kept = [step.moments["loss"].activations for step in (look, plain.step("look"))]
    assert kept[0] < kept[1] if name == "synflow, ones" else kept[0] == kept[1]


@pytest.mark.parametrize(
    ("dtype", "always"), [(torch.float32, ()), (torch.bfloat16, ()), (torch.bfloat16, ("model.embed_tokens.weight",))]
)
def test_a_refresh_holds_the_planned_state_beside_its_look(
    dtype: torch.dtype, always: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`live_bytes` leaves indices out, and the bits that say when entries joined: 1,000 steps in 125 bytes a tensor."""
    seen = watch_derivatives(monkeypatch)
    model = tiny_llama(dtype=dtype)
    batches = [tiny_batch(model, seed=seed) for seed in range(2)]
    mask = gs.StaticMask(salience=gs.salience.snip, density=0.05, batches=batches, refresh_every=2)
    found = gs.plan(model, mask, batch_size=2, sequence_length=8, always=always)
    for _ in range(2):  # the first run fills caches of the process
        seen.clear()
        optimizer = gs.SparseOptimizer(model, mask, always=always)
        for step in range(3):
            model(**tiny_batch(model, seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        num_entries = sum(map(len, optimizer.entries.values()))
        optimizer.close()
        del optimizer  # before the next one is built
    first, later = seen[:2], seen[2:]  # one for each batch
    look, refresh = (found.step(kind).moments["update"] for kind in ("look", "refresh"))
    integers = 4 * num_entries + 125 * (len(list(model.parameters())) - len(always))
    assert max(later) - max(first) == refresh.masters + refresh.state_on_device - integers
    assert replace(refresh, masters=0, state_on_device=0) == look
    assert found.peak_bytes >= refresh.device


@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_time_of_refreshes_is_spread_over_the_steps(accumulation_steps: int) -> None:
    def planned(salience: gs.salience.AbstractSalience, num_batches: int, every: int | None) -> Plan:
        batches = [{}] * num_batches or None
        mask = gs.StaticMask(salience=salience, density=0.05, batches=batches, refresh_every=every)
        sizes = {"batch_size": 2, "sequence_length": 8, "accumulation_steps": accumulation_steps}
        return gs.plan(tiny_llama(), mask, **sizes)

    once, often = (planned(gs.salience.snip, 3, every) for every in (None, 6))
    assert [step.kind for step in once.steps] == ["look", "step"]
    assert [step.kind for step in often.steps] == ["look", "refresh", "step"]
    full = gs.plan(tiny_llama(), None, batch_size=2, sequence_length=8).relative_time
    assert often.step("refresh").relative_time == pytest.approx(3 * full / accumulation_steps)
    assert often.relative_time - once.relative_time == pytest.approx(3 * full / accumulation_steps / 6)
    per_batch = planned(gs.salience.grasp, 2, 6).step("refresh").relative_time * accumulation_steps / 2
    assert per_batch == pytest.approx(4 * full)  # torch counts 3 times the operations of a gradient in the product
    # A refresh after the end of the run is none, and weights or the gradient of a step need no look.
    assert [step.kind for step in planned(gs.salience.snip, 3, 1001).steps] == ["look", "step"]
    assert [step.kind for step in planned(gs.salience.magnitude, 0, 2).steps] == ["step"]
    assert [step.kind for step in planned(gs.salience.gradient, 0, 2).steps] == ["step"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
def test_bytes_of_masks_are_exact(name: str, dtype: torch.dtype) -> None:
    """Except for the bits that say when entries joined: the plan is for a long run, so it has at least as many."""
    always = ("model.norm.weight",) if name != "bitfit" else ()
    found = gs.plan(tiny_llama(dtype=dtype), MASKS[name], batch_size=2, sequence_length=8, always=always)
    model = tiny_llama(dtype=dtype)
    optimizer = gs.SparseOptimizer(model, MASKS[name], always=always)
    seen = []
    for step in range(NUM_STEPS):
        model(**tiny_batch(model, seed=step)).loss.backward()
        seen.append(dict(optimizer.memory()))
        optimizer.step()
        optimizer.zero_grad()
    for category in ("weights", "gradients", "masters"):
        assert max(each[category] for each in seen) == of(found, category)
    bits = of(found, "state_on_device") - max(each["state_on_device"] for each in seen)
    assert 0 <= bits <= 125 * len(list(model.parameters()))


def test_categories_are_those_of_memory_and_three_more() -> None:
    assert (*MEMORY_CATEGORIES, "activations", "logits", "workspace") == CATEGORIES
    assert set(gs.BlockOptimizer(tiny_llama(), gs.All()).memory()) == set(MEMORY_CATEGORIES)


def test_plain_adamw_is_exact() -> None:
    model = tiny_llama()
    found = gs.plan(model, None, batch_size=2, sequence_length=8)
    number = sum(parameter.numel() for parameter in model.parameters())
    assert (found.bytes.weights, found.bytes.gradients, found.bytes.state_on_device) == (
        4 * number,
        4 * number,
        8 * number,
    )


# Time ---------------------------------------------------------------------------------------------------------------


def test_everything_takes_the_time_of_full_fine_tuning() -> None:
    for choice in (None, gs.All(), gs.GMT()):
        found = gs.plan(tiny_llama(), choice, batch_size=2, sequence_length=8)
        assert found.relative_time == pytest.approx(1)
        assert found.backward_skipped == pytest.approx(0)


def test_time_of_the_top_layer_follows_its_operations() -> None:
    model = tiny_llama(layers=4)
    found = gs.plan(model, gs.Fixed(("layer.3",)), batch_size=2, sequence_length=8)
    cost = StepCost.of_model(model, gs.partition(model))
    assert found.relative_time == pytest.approx(cost.relative_time(["layer.3"]))
    again = gs.plan(model, gs.Fixed(("layer.3",)), batch_size=2, sequence_length=8, gradient_checkpointing=True)
    layer = cost.weights["layer.3"]
    assert again.relative_time - found.relative_time == pytest.approx(2 * layer / cost.full)
    assert found.backward_skipped == pytest.approx(1 - cost.backward(["layer.3"]) / (4 * cost.total))


def test_mean_by_lowest_and_size_are_those_of_many_draws() -> None:
    """2,000 draws give the means to 3 %."""
    blocks = gs.partition(tiny_llama(layers=8))
    policy = gs.Uniform(count=3, among=("layer.*",)).bind(blocks)
    names = list(policy.names)
    visited = {name: (len(names) - place) / len(names) for place, name in enumerate(names)}
    sizes = {name: 1.0 + place for place, name in enumerate(names)}
    found = survey(gs.Uniform(count=3, among=("layer.*",)).bind(blocks))
    draws = [policy.propose(step) for step in range(2000)]
    depths = [max(visited[name] for name in draw) for draw in draws]
    elements = [sum(sizes[name] for name in draw) for draw in draws]
    assert mean_by_lowest(found, visited) == pytest.approx(sum(depths) / len(depths), rel=0.03)
    assert mean_sum(found, sizes) == pytest.approx(sum(elements) / len(elements), rel=0.03)


@pytest.mark.parametrize(
    "policy",
    [gs.Uniform(count=2, every=500), gs.Cyclic(every=700), gs.Cyclic(every=5000), gs.Uniform(count=2, every=2500)],
)
def test_a_policy_that_seldom_changes_does_not_count_as_fixed(policy: gs.AbstractPolicy) -> None:
    found = survey(policy.bind(gs.partition(tiny_llama())))
    assert not found.is_fixed
    assert set(found.reached) == {block.name for block in gs.partition(tiny_llama())}


# Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 450, 1250])
@pytest.mark.parametrize("order", ["random", "rotate"])
def test_strata_that_seldom_change_hold_the_state_of_all_blocks_sooner_or_later(order: Any, every: int) -> None:
    model = tiny_llama(layers=2)
    blocks = gs.partition(model, by="columns", parts=8)
    policy = gs.Stratified(fraction=0.3, order=order, every=every, among=("layer.*.columns.*",))
    found = gs.plan(model, policy, blocks=blocks, batch_size=1, sequence_length=4, residency=gs.Keep())
    columns = [block for block in blocks if ".columns." in block.name]
    assert found.bytes.state_on_device == 8 * sum(block.num_elements for block in columns)


@pytest.mark.parametrize("every", [1, 450])
def test_the_largest_blocks_of_each_stratum_are_planned_also_where_few_draws_are_seen(every: int) -> None:
    model = tiny_llama(layers=2)
    blocks = gs.partition(model, by="matrix")
    policy = gs.Stratified(count=1, by="category", every=every, among=("layer.*.*.*",))
    found = gs.plan(model, policy, blocks=blocks, batch_size=1, sequence_length=4, residency=gs.Offload())
    num_elements = {block.name: block.num_elements for block in blocks}
    largest = sum(
        num_elements[f"layer.{layer}.{name}"] for layer in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")
    )
    assert found.bytes.state_on_device == 8 * largest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"sequence_length": -1}, "sequence_length"),
        ({"choice": "adagradselect"}, "neither a policy nor a mask"),
        ({"choice": gs.All(), "always": "nothing"}, "nothing"),
    ],
)
def test_mistakes_are_refused_with_the_argument(options: dict[str, Any], words: str) -> None:
    given = {"choice": gs.All(), "batch_size": 2, "sequence_length": 8, **options}
    with pytest.raises(gs.UsageError, match=words):
        gs.plan(tiny_llama(), **given)
