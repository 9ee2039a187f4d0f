"""Methods of the literature on slices and categories: what they select, what that costs, and runs of the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from slice_support import in_layer, train
from test_train_peers import run
from tiny_models import tiny_batch, tiny_llama
from torch.utils.flop_counter import FlopCounterMode

import gradselect as gs
from gradselect import UsageError
from gradselect.blocks import StepCost
from gradselect.methods import AbstractBlockMethod, Method

# TRL 1.16 uses names that transformers 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

ON_SLICES = ("paca", "s2ft", "chunkft", "losia")


def preset(name: str, **settings: Any) -> AbstractBlockMethod:
    method = TypeAdapter(Method).validate_python({"name": name, **settings})
    assert isinstance(method, AbstractBlockMethod)
    return method


def optimizer_of(model: torch.nn.Module, name: str, *, seed: int = 0, **settings: Any) -> gs.BlockOptimizer:
    method = preset(name, **settings)
    blocks = gs.partition(model, by=method.blocks, parts=method.parts)
    policy = method.policy(seed=seed, block_names=[block.name for block in blocks])
    return gs.BlockOptimizer(model, policy, blocks=blocks, always=method.always, residency=method.place(), lr=1e-2)


@pytest.mark.parametrize("name", ON_SLICES)
def test_one_slice_in_eight_of_each_layer_trains_and_nothing_else(name: str) -> None:
    model = tiny_llama()
    layers = range(model.config.num_hidden_layers)
    seen = set()
    for record in train(model, optimizer_of(model, name), range(9)):
        assert [len(in_layer(layer, record.selected)) for layer in layers] == [1] * len(layers)
        assert len(record.selected) == len(layers)
        seen |= set(record.selected)
    assert len(seen) == (8 if name == "chunkft" else 1) * len(layers)


def test_hft_trains_half_of_each_category_for_the_run() -> None:
    model = tiny_llama()
    records = list(train(model, optimizer_of(model, "hft"), range(3)))
    (selected,) = {record.selected for record in records}
    layers = range(model.config.num_hidden_layers)
    assert [sum(name.startswith(f"layer.{n}.self_attn.") for name in selected) for n in layers] == [2] * len(layers)
    in_mlp = [sum(name.startswith(f"layer.{n}.mlp.") for name in selected) for n in layers]
    assert in_mlp == [1 + n % 2 for n in layers]
    assert sum(name.endswith(".vectors") for name in selected) in (len(layers) // 2, (len(layers) + 1) // 2)
    assert {"embedding", "norm"} < set(selected)


def test_hft_draws_anew_each_round_if_rounds_have_a_length() -> None:
    model = tiny_llama()
    records = list(train(model, optimizer_of(model, "hft", order="random", every=2), range(6)))
    assert [records[n].selected == records[n + 1].selected for n in range(5)] == [True, False, True, False, True]


def test_losia_selects_the_slices_of_largest_importance_of_its_slot() -> None:
    model = tiny_llama()
    optimizer = optimizer_of(model, "losia", every=2)
    norms = [record.norms for record in train(model, optimizer, range(2))]
    scores = {}
    for name in norms[0]:
        average = uncertainty = 0.0
        for each in norms:
            average = 0.85 * average + 0.15 * each[name]
            uncertainty = 0.85 * uncertainty + 0.15 * abs(each[name] - average)
        scores[name] = average * uncertainty
    assert in_layer(0, optimizer.trainable) == [max(scores, key=scores.__getitem__)]


@pytest.mark.parametrize("name", ["paca", "chunkft"])
def test_the_weight_gradients_cost_exactly_the_share_of_each_layer_at_every_step(name: str) -> None:
    """By torch's counter, against the same step of all slices."""

    def flops(settings: dict[str, Any]) -> list[int]:
        model = tiny_llama()
        optimizer = optimizer_of(model, name, **settings)
        counts = []
        for step in range(4):
            batch = tiny_batch(model, seed=step)
            with FlopCounterMode(display=False) as counter:
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            counts.append(counter.get_total_flops())
        return counts[1:]  # the first step looks for what the loss reaches

    model = tiny_llama()
    num_tokens = tiny_batch(model, seed=0)["input_ids"].numel()
    weights = sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".layers." in name and parameter.ndim > 1
    )
    (share,), (whole,) = set(flops({})), set(flops({"count": 8}))
    assert whole - share == 7 / 8 * 2 * num_tokens * weights


@pytest.mark.parametrize("name", [*ON_SLICES, "hft"])
def test_a_plan_has_the_cost_of_the_steps_that_follow(name: str) -> None:
    model = tiny_llama()
    method = preset(name)
    blocks = gs.partition(model, by=method.blocks, parts=method.parts)
    policy = method.policy(seed=0, block_names=[block.name for block in blocks])
    (planned,) = gs.plan(model, policy, batch_size=2, sequence_length=8, blocks=blocks, residency=gs.Keep()).steps
    optimizer = gs.BlockOptimizer(model, policy, blocks=blocks, residency=gs.Keep(), lr=1e-2)
    cost = StepCost.of_model(model, blocks)
    for record in train(model, optimizer, range(4)):
        assert cost.relative_time({*record.selected, *record.norms}) == pytest.approx(planned.relative_time)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    "policy",
    [
        gs.LoSiA(count=1, among=("layer.*.*.*",)),
        gs.Stratified(count=1, order="norm", among=("layer.*.*.*",)),
        gs.GradNormTopK(count=1, among=("layer.*.*.*",)),
    ],
    ids=["losia", "norm", "no strata"],
)
def test_a_plan_counts_the_gradients_that_are_looked_at(policy: gs.AbstractPolicy, passes: int) -> None:
    """Slices of a layer complete one after the other in its last linear, and are freed there: a little below."""
    model = tiny_llama()
    blocks = gs.partition(model, by="columns")
    plan = gs.plan(model, policy, batch_size=2, sequence_length=8, blocks=blocks, accumulation_steps=passes)
    most = 0

    def measure(_: torch.Tensor) -> None:
        nonlocal most
        gradients = [parameter.grad for block in blocks for parameter in block.parameters]
        most = max(most, sum(each.numel() * each.element_size() for each in gradients if each is not None))

    for block in blocks:
        for parameter in block.parameters:
            parameter.register_post_accumulate_grad_hook(measure)
    optimizer = gs.BlockOptimizer(model, policy, blocks=blocks, lr=1e-2, accumulation_steps=passes)
    for number in range(passes):
        model(**tiny_batch(model, seed=number)).loss.backward()
    optimizer.step()
    planned = plan.steps[0].bytes.gradients
    assert planned == most if passes > 1 else most <= planned <= 1.2 * most


@pytest.mark.parametrize("name", [*ON_SLICES, "hft"])
def test_a_run_of_the_command_trains_with_it(name: str, place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out", method={"name": name}, run={"steps": 3})
    assert len(result["selection"]["selected"]) == 3
    assert result["flop"]["limit"] > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "paca", "order": "random"}, "order"),
        ({"name": "losia", "ema": 1}, "write ema=0.85"),
        ({"name": "hft", "order": "rotate"}, "order"),
        ({"name": "hft", "every": 50}, "draws once; leave one of them out"),
    ],
)
def test_a_wrong_key_of_a_preset_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, ValueError), match=message):
        TypeAdapter(Method).validate_python(settings)


def test_a_preset_on_whole_layers_is_refused_with_what_to_write() -> None:
    with pytest.raises(UsageError, match=r"layer\.\*\.\*\.\*"):
        optimizer_of(tiny_llama(), "chunkft", blocks="layer")
