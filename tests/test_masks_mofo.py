"""MoFO: only the entries of largest momentum in each tensor move."""

import copy

import pytest
import torch
from tiny_models import tiny_batch, tiny_llama
from torch import Tensor, nn

import gradselect as gs
from gradselect import UsageError

BETA1, BETA2, EPS, RATE, DECAY = 0.9, 0.99, 1e-8, 1e-2, 0.1


def twin_step(model: nn.Module, states: dict[str, tuple[Tensor, Tensor]], *, step: int, fraction: float) -> None:
    """One step with every gradient kept, and the largest moments found by sorting them."""
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        mean, square = states[name]
        mean.copy_(BETA1 * mean + (1 - BETA1) * parameter.grad)
        square.copy_(BETA2 * square + (1 - BETA2) * parameter.grad**2)
        moves = torch.ones_like(mean, dtype=torch.bool)
        if parameter.ndim > 1:
            ranked = sorted(mean.abs().view(-1).tolist(), reverse=True)
            moves = mean.abs() >= ranked[max(1, int(fraction * len(ranked))) - 1]
        decayed = parameter * (1 - RATE * DECAY if parameter.ndim > 1 else 1.0)
        update = (mean / (1 - BETA1**step)) / ((square / (1 - BETA2**step)).sqrt() + EPS)
        parameter.copy_(torch.where(moves, decayed - RATE * update, parameter))


def test_the_weights_are_those_of_sorting_all_moments() -> None:
    model, twin = tiny_llama(layers=2), tiny_llama(layers=2)
    optimizer = gs.SparseOptimizer(
        model, gs.MoFO(fraction=0.1), lr=RATE, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY
    )
    states = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in twin.named_parameters()}
    for step in range(4):
        for each in (model, twin):
            each(**tiny_batch(each, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            twin_step(twin, states, step=step + 1, fraction=0.1)
        twin.zero_grad()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-5, atol=1e-6)
    record = optimizer.last_record
    assert record is not None
    assert record.num_entries["model.layers.0.mlp.up_proj.weight"] == 51
    assert record.num_entries["model.norm.weight"] == 16


def test_momentum_decides_and_not_the_gradient_of_the_step() -> None:
    """The entry with the largest gradient of the second step stays, because its momentum is small."""
    layer = nn.Linear(2, 1, bias=False)
    optimizer = gs.SparseOptimizer(layer, gs.MoFO(fraction=0.5), rule=gs.SGDRule(momentum=0.9), lr=0.1, weight_decay=0)
    (layer(torch.tensor([[10.0, 0.0]]))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = layer.weight.detach().clone()
    layer(torch.tensor([[0.0, 2.0]])).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight != before, torch.tensor([[True, False]]))


def test_moments_see_the_gradients_of_entries_that_stay() -> None:
    layer = nn.Linear(4, 4, bias=False)
    optimizer = gs.SparseOptimizer(layer, gs.MoFO(fraction=0.1), lr=0.1)
    layer(torch.randn(3, 4, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    assert bool((optimizer.state[layer.weight]["exp_avg"] != 0).all())


def test_a_patch_holds_what_moved_and_makes_a_copy_equal() -> None:
    model = tiny_llama(layers=2)
    follower = copy.deepcopy(model)
    optimizer = gs.SparseOptimizer(model, gs.MoFO(fraction=0.1, among="*mlp*"), lr=RATE)
    for step in range(3):
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        patch = optimizer.changed_entries()
        gs.delta.apply_patch(follower, patch)
        assert all(torch.equal(p, follower.get_parameter(name)) for name, p in model.named_parameters())
    assert {len(indices) for indices, _ in patch.values()} == {51}


@pytest.mark.parametrize("rule", [gs.AdamW8bitRule(), gs.SGDRule(momentum=0.0)], ids=["8 bit", "no momentum"])
def test_a_rule_without_momentum_in_full_precision_is_refused(rule: gs.AbstractRule) -> None:
    with pytest.raises(UsageError, match=r"ranks entries by their momentum.*write rule=gs\.AdamWRule\(\)"):
        gs.SparseOptimizer(tiny_llama(layers=2), gs.MoFO(), rule=rule)
