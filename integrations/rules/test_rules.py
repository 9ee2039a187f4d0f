"""Optimizer classes of other packages as rules: bitwise the class itself, resumed bitwise, in every residency."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import schedulefree
import torch
from lion_pytorch import Lion
from torch import Tensor, nn
from torch.optim import Optimizer
from torchao.optim import Adam8bit, AdamW4bit, AdamW8bit, AdamWFp8

import gradselect as gs

SHARED = "keeps numbers that several entries share"
# Class, options, why it moves no single entries, bytes of state for each byte of AdamW's.
TABLE: dict[str, tuple[type[Optimizer], dict[str, Any], str, float]] = {
    "Lion": (Lion, {}, "", 0.5),
    "Lion, decay apart from the learning rate": (Lion, {"decoupled_weight_decay": True}, "", 0.5),
    "torchao AdamW8bit": (AdamW8bit, {}, SHARED, 0.35),
    "torchao Adam8bit": (Adam8bit, {}, SHARED, 0.35),
    "torchao AdamW4bit": (AdamW4bit, {}, SHARED, 0.2),
    "torchao AdamWFp8": (AdamWFp8, {}, SHARED, 0.35),
}
each_row = pytest.mark.parametrize(("kind", "options", "whole", "share"), TABLE.values(), ids=TABLE)


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).to(dtype)


def train(model: nn.Sequential, optimizer: Any, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
        (model(inputs).float() - inputs.float().roll(1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(map(torch.equal, first.parameters(), second.parameters()))


def blocks(model: nn.Module, rule: gs.TorchRule, policy: gs.AbstractPolicy, residency: Any) -> gs.BlockOptimizer:
    return gs.BlockOptimizer(model, policy, rule=rule, residency=residency, lr=1e-3, weight_decay=0.1, no_decay=())


@each_row
def test_selecting_everything_is_the_class_itself_bitwise(
    kind: Callable[..., Optimizer], options: dict[str, Any], whole: str, share: float
) -> None:
    rule = gs.TorchRule(kind, **options)  # type: ignore[arg-type]
    ours, theirs = make_model(), make_model()
    optimizer = blocks(ours, rule, gs.All(), gs.Offload())
    plain = kind(theirs.parameters(), lr=1e-3, weight_decay=0.1, **options)
    for step in range(5):
        train(ours, optimizer, range(step, step + 1))
        train(theirs, plain, range(step, step + 1))
        assert same(ours, theirs), step
    assert rule.why_whole_tensors == whole
    of_adamw = 8 * sum(parameter.numel() for parameter in ours.parameters())
    assert optimizer.memory()["state_on_device"] <= share * of_adamw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("residency", [gs.Keep(), gs.Offload(), gs.Drop()], ids=["keep", "offload", "drop"])
@each_row
def test_a_resumed_run_is_the_same_bitwise(
    kind: Any, options: dict[str, Any], whole: str, share: float, residency: Any, dtype: torch.dtype
) -> None:
    rule = gs.TorchRule(kind, **options)
    model, again = make_model(dtype), make_model(dtype)
    optimizer = blocks(model, rule, gs.Uniform(count=2), residency)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    weights = copy.deepcopy(model.state_dict())
    for state in optimizer.state.values():
        assert all(type(value) is Tensor for value in state.values())
    resumed = blocks(again, gs.TorchRule(kind, **options), gs.Uniform(count=2), residency)
    again.load_state_dict(weights)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(model, optimizer, range(3, 6))
    train(again, resumed, range(3, 6))
    assert same(model, again)


@pytest.mark.parametrize("kind", [schedulefree.AdamWScheduleFree, schedulefree.SGDScheduleFree])
def test_schedule_free_is_refused(kind: Any) -> None:
    with pytest.raises(gs.UsageError, match="averages weights that it believes to move at every step"):
        gs.TorchRule(kind)
