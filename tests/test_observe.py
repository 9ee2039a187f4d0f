"""Norms taken during the backward pass, and gradients that are gone when they cannot matter."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_batch, tiny_llama, tiny_mixtral
from torch import nn

import gradselect as gs
from gradselect._observe import GradientObserver, gradient_norm
from gradselect.reference import block_norms, top_blocks


def backward(model, *, seed=0):
    model(**tiny_batch(model, seed=seed)).loss.backward()


def observer_of(model, **settings):
    blocks = gs.partition(model)
    observer = GradientObserver({block.name: block.parameters for block in blocks}, **settings)
    observer.watch([block.name for block in blocks], scale=lambda: 1.0)
    return observer, blocks


@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral])
def test_norms_equal_the_readable_twin(build):
    """Tolerance: the hooks add squares in fp32, the twin in fp64."""
    model, twin = build(), build()
    observer, _ = observer_of(model)
    backward(model)
    observer.finish()
    backward(twin)
    assert observer.norms == pytest.approx(block_norms(gs.partition(twin)), rel=1e-5)


@pytest.mark.parametrize("keep", [0, 1, 2, 6, 7])
def test_streaming_keeps_exactly_the_best_blocks(keep):
    model, twin = tiny_llama(), tiny_llama()
    observer, blocks = observer_of(model)
    observer.stream(keep=keep, score=lambda _, norm: norm)
    backward(model)
    backward(twin)
    expected = top_blocks(block_norms(gs.partition(twin)), keep)
    for block in blocks:
        for name, parameter in zip(block.parameter_names, block.parameters, strict=True):
            if block.name in expected:
                assert torch.equal(parameter.grad, twin.get_parameter(name).grad)
            else:
                assert parameter.grad is None


def test_tie_goes_to_the_earlier_block_and_nan_ranks_last():
    model = tiny_llama()
    observer, blocks = observer_of(model)
    scores = {block.name: 1.0 for block in blocks} | {"embedding": float("nan"), "norm": 2.0}
    observer.stream(keep=2, score=lambda name, _: scores[name])
    backward(model)
    held = {block.name for block in blocks if block.parameters[0].grad is not None}
    assert held == {"norm", "layer.0"}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_at_most_k_plus_one_blocks_hold_gradients_during_an_explore_step(count):
    """Peak of the gradient bytes, looked at after every single gradient has arrived."""
    model = tiny_llama(layers=6)
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=count), lr=1e-2)
    blocks = gs.partition(model)
    seen = []

    def look(_):
        seen.append([b.name for b in blocks if any(p.grad is not None for p in b.parameters)])

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    backward(model)
    sizes = {block.name: sum(4 * p.numel() for p in block.parameters) for block in blocks}
    assert max(map(len, seen)) <= count + 1
    assert optimizer.memory()["gradients"] == sum(sizes[name] for name in seen[-1])
    assert len(seen[-1]) == count
    optimizer.step()
    assert set(optimizer.last_record.selected) == set(seen[-1])
    optimizer.zero_grad()
    assert optimizer.memory()["gradients"] == 0


def test_only_the_last_micro_batch_releases():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=1e-2, accumulation_steps=2)
    backward(model, seed=0)
    assert all(p.grad is not None for p in model.parameters())
    backward(model, seed=1)
    held = [b.name for b in gs.partition(model) if any(p.grad is not None for p in b.parameters)]
    optimizer.step()
    assert held == list(optimizer.last_record.selected)


def test_unused_parameter_leaves_its_block_measured_all_the_same():
    """A block is complete only when all its gradients have arrived; one that never comes must not hide the block."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    layers = nn.ModuleList(Layer() for _ in range(3))
    model = nn.Sequential(*layers)
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=1e-2)
    model(torch.randn(2, 4, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    assert all(norm > 0 for norm in optimizer.last_record.norms.values())
    assert len(optimizer.last_record.norms) == 3
    assert sum(p.grad is not None for p in model.parameters()) == 2


def test_norm_of_bf16_gradients_is_summed_in_fp32():
    """In bf16 a sum of 4096 squares of 1 stalls at 256."""
    parameter = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    parameter.grad = torch.ones(4096, dtype=torch.bfloat16)
    assert gradient_norm([parameter]) == 64.0


def test_discarded_observer_does_not_live_on_in_its_hooks():
    model = tiny_llama()
    optimizer = gs.BlockOptimizer(model, gs.GradNormTopK(count=1), lr=1e-2)
    optimizer.close()
    del optimizer
    backward(model)
    assert all(p.grad is not None for p in model.parameters())
    assert all(getattr(p, "gradselect_owner", None) is None for p in model.parameters())
