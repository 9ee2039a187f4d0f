"""Stop a run after every step, save it with torch, and resume it in new objects.

Each resumed run takes one step, and must then be what the whole run was: weights, state, records and memory, bit for
bit. So the next resumed run starts where this one ended, and step by step this proves the rest. One run in the middle
goes on to the end, for what a state dict may lack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from policy_support import through_torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


def same(first: Any, second: Any) -> bool:
    """Nested mappings and lists of tensors and plain values, bitwise."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def assert_resumes(
    build: Callable[[Weights | None], tuple[nn.Module, Any]],
    step: Callable[[nn.Module, Any, int], object],
    *,
    num_steps: int,
    change: Callable[[int, dict[str, Any]], None] = lambda stop, state: None,
) -> None:
    """Assert that a run resumes at every step.

    Args:
        build: makes a model, with these weights if there are any, and its optimizer.
        step: takes the step of this number; what it returns must be the same after resuming.
        num_steps: length of the whole run.
        change: changes a state dict before it is loaded, as others do that pass it on.
    """
    model, optimizer = build(None)
    saved, returned = [_snapshot(model, optimizer)], []
    for number in range(num_steps):
        returned.append(step(model, optimizer, number))
        saved.append(_snapshot(model, optimizer))
    for stop in range(num_steps):
        weights, state, _ = copy.deepcopy(saved[stop])
        change(stop, state)
        again, resumed = build(weights)
        resumed.load_state_dict(state)
        end = num_steps if stop == num_steps // 2 else stop + 1
        assert [step(again, resumed, number) for number in range(stop, end)] == returned[stop:end], stop
        for ours, theirs in zip(_snapshot(again, resumed), saved[end], strict=True):
            assert same(ours, theirs), stop


def _snapshot(model: nn.Module, optimizer: Any) -> tuple[Weights, dict[str, Any], Any]:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return weights, through_torch(optimizer.state_dict()), optimizer.memory()
