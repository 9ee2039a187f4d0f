"""Masks and what the loss never reaches: entries that are lost are said, and gradients choose none of them."""

from __future__ import annotations

import logging

import pytest
import torch
from reach_support import parts, tokens
from torch import nn

import gradselect as gs

DEAD = ("pooler.weight", "tower.weight", "expert_0.weight", "expert_1.weight")


def train(optimizer: gs.SparseOptimizer, model: nn.Module, steps: int = 2) -> None:
    for number in range(steps):
        model(tokens(number)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "mask",
    [
        gs.StaticMask(salience=gs.salience.random, density=0.2),
        gs.StaticMask(salience=gs.salience.magnitude, density=0.2),
        gs.StaticMask(density=0.2, scope="tensor"),
        gs.TopGradient(density=0.2),
        gs.LIFT(density=0.2),
    ],
    ids=lambda mask: f"{type(mask).__name__}, {getattr(getattr(mask, 'salience', None), 'name', '')}",
)
def test_entries_in_tensors_without_a_gradient_are_said_with_numbers(mask, caplog):
    model = parts(skipped=(1,))
    optimizer = gs.SparseOptimizer(model, mask, lr=1e-2)
    train(optimizer, model)
    (message,) = caplog.messages
    assert type(mask).__name__ in message
    assert "tensors that got no gradient in the first step: layers.1." in message
    assert "among" in message


@pytest.mark.parametrize("mask", [gs.StaticMask(density=0.9), gs.ID3(density=0.9, steps=1), gs.GMT(fraction=0.9)])
def test_gradients_choose_no_entry_that_has_none(mask, caplog):
    model = parts()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = gs.SparseOptimizer(model, mask, lr=1e-2)
    train(optimizer, model)
    assert not set(DEAD).intersection(optimizer.entries)
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in DEAD)
    assert caplog.messages == []


@pytest.mark.parametrize(
    "salience", [gs.salience.gradient, gs.salience.fisher, gs.salience.grasp], ids=lambda s: s.name
)
def test_batches_choose_no_entry_of_a_tensor_that_they_do_not_reach(salience, caplog):
    """With a budget beyond what is reached, zeros would fill the rest."""
    model = parts()
    mask = gs.StaticMask(
        salience=salience,
        density=0.95,
        batches=[{"tokens": tokens(0)}],
        loss=lambda model, batch: model(**batch),
    )
    optimizer = gs.SparseOptimizer(model, mask, lr=1e-2)
    assert not set(DEAD).intersection(optimizer.entries)
    assert "the batches reach no entry of 8 of" in caplog.text


MASKS = {
    "random": gs.StaticMask(salience=gs.salience.random, density=0.5, among=DEAD),
    "gradient": gs.StaticMask(density=0.5, among=DEAD),
    "ID3": gs.ID3(density=0.5, steps=2, among=DEAD),
    "GMT": gs.GMT(fraction=0.5, among=DEAD),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("always", [(), ("head.*",)])
def test_a_mask_that_the_loss_does_not_reach_is_refused(mask, always):
    model = parts()
    optimizer = gs.SparseOptimizer(model, mask, lr=1e-2, always=always)
    model(tokens(0)).backward()
    with pytest.raises(gs.UsageError, match=r"the loss reaches no tensor in which \w+ has entries: .*weight.*among"):
        optimizer.step()


def test_batches_that_reach_nothing_are_refused():
    mask = gs.StaticMask(density=0.5, among=DEAD, batches=[{"tokens": tokens(0)}], loss=lambda m, b: m(**b))
    model = parts()
    with pytest.raises(gs.UsageError, match="the batches reach none of the 4 tensors"):
        gs.SparseOptimizer(model, mask, lr=1e-2)


def test_a_step_before_any_pass_and_a_resumed_run_say_nothing(caplog):
    model = parts()
    mask = gs.StaticMask(salience=gs.salience.random, density=0.2)
    optimizer = gs.SparseOptimizer(model, mask, lr=1e-2)
    optimizer.step()
    assert caplog.messages == []
    train(optimizer, model)
    assert len(caplog.messages) == 1
    saved = optimizer.state_dict()
    resumed = gs.SparseOptimizer(model, mask, lr=1e-2)
    resumed.load_state_dict(saved)
    train(resumed, model)
    assert len(caplog.messages) == 1
    with caplog.at_level(logging.ERROR):
        resumed.close()
    assert not any(
        type(hook).__name__ == "_Probe" for module in model.modules() for hook in module._forward_hooks.values()
    )
