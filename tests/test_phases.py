"""Named phases of a step, for a meter: entered and left in pairs, and nothing changes by being listened to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from distributed_support import rows, tiny
from policy_support import through_torch
from torch import Tensor, nn

import gradselect as gs

Build = Callable[[], tuple[nn.Module, Any]]


def blocks(policy: gs.AbstractPolicy, **options: Any) -> Build:
    def build() -> tuple[nn.Module, gs.BlockOptimizer]:
        model = tiny(dtype=torch.bfloat16)
        return model, gs.BlockOptimizer(model, policy, lr=1e-2, **options)

    return build


def entries(mask: Any, **options: Any) -> Build:
    def build() -> tuple[nn.Module, gs.SparseOptimizer]:
        model = tiny(dtype=torch.bfloat16)
        return model, gs.SparseOptimizer(model, mask, lr=1e-2, **options)

    return build


CASES: dict[str, Build] = {
    "explore": blocks(gs.AdaGradSelect(count=2, explore_steps=3), residency=gs.Offload()),
    "drawn": blocks(gs.Uniform(count=1), residency=gs.Offload()),
    "in backward": blocks(gs.Cyclic(every=1), update_in_backward=True),
    "accumulation": blocks(gs.GradNormTopK(count=1), accumulation_steps=2),
    "skipping": blocks(gs.GradNormTopK(count=1), skip_nonfinite=True),
    "id3": entries(gs.ID3(budget=60, steps=4), always="norm.*", max_grad_norm=0.5),
    "lift": entries(gs.LIFT(rank=1, refresh_every=2)),
    "gmt": entries(gs.GMT(fraction=0.3)),
}
each_case = pytest.mark.parametrize("build", CASES.values(), ids=CASES)


class Meter:
    """Writes down what is entered and left."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[tuple[str, ...]] = []
        self.num_left = 0

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.open.append(name)
        self.seen.append(tuple(self.open))
        try:
            yield
        finally:
            assert self.open.pop() == name
            self.num_left += 1


def train(model: nn.Module, optimizer: Any, steps: range, *, meter: Meter | None = None) -> None:
    for step in steps:
        for part in range(optimizer.accumulation_steps):
            model(rows(10 * step + part, rank=0, world=1)).backward()
            assert meter is None or not meter.open
        optimizer.step()
        optimizer.zero_grad()
        assert meter is None or not meter.open


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@each_case
def test_phases_are_left_in_the_order_in_which_they_are_entered(build: Build) -> None:
    model, optimizer = build()
    meter = Meter()
    optimizer.phases(meter.span)
    for step in range(5):
        already = len(meter.seen)
        train(model, optimizer, range(step, step + 1), meter=meter)
        assert any(path[-1] == "selection" for path in meter.seen[already:])
    assert meter.num_left == len(meter.seen)
    assert {name for path in meter.seen for name in path} <= {"selection", "state"}
    if isinstance(optimizer, gs.BlockOptimizer):
        assert any(path[-1] == "state" for path in meter.seen)


@each_case
def test_a_listener_changes_no_bit(build: Build) -> None:
    ends = []
    for listens in (True, False):
        model, optimizer = build()
        records: list[Any] = []
        optimizer.add_record_hook(records.append)
        if listens:
            optimizer.phases(Meter().span)
        train(model, optimizer, range(5))
        ends.append((dict(model.state_dict()), through_torch(optimizer.state_dict()), records, optimizer.memory()))
    assert same(*ends)


@each_case
def test_a_listener_may_come_and_go_between_steps(build: Build) -> None:
    model, optimizer = build()
    train(model, optimizer, range(1))
    first, second = Meter(), Meter()
    handle = optimizer.phases(first.span)
    train(model, optimizer, range(1, 2))
    handle.remove()
    num_seen = len(first.seen)
    train(model, optimizer, range(2, 3))
    assert len(first.seen) == num_seen > 0
    optimizer.phases(second.span)
    train(model, optimizer, range(3, 4))
    assert len(first.seen) == num_seen
    assert second.seen


@each_case
def test_a_second_listener_is_refused_and_the_first_stays(build: Build) -> None:
    model, optimizer = build()
    first, second = Meter(), Meter()
    optimizer.phases(first.span)
    with pytest.raises(gs.UsageError, match=r"phases\(\) has a listener already; remove it first: handle.remove\(\)"):
        optimizer.phases(second.span)
    train(model, optimizer, range(1))
    assert first.seen
    assert not second.seen


def test_a_phase_is_left_when_it_is_interrupted() -> None:
    """Here by a policy that fails in the backward pass, where it ranks a block."""

    class Failing(gs.AbstractPolicy):
        def start(self) -> None:
            pass

        def propose(self, step: int) -> None:
            return None

        def keep_at(self, step: int) -> int:
            return 1

        def score(self, step: int, name: str, norm: float) -> float:
            raise RuntimeError("no score")

    model = tiny()
    optimizer = gs.BlockOptimizer(model, Failing())
    meter = Meter()
    optimizer.phases(meter.span)
    with pytest.raises(RuntimeError, match="no score"):
        model(rows(0, rank=0, world=1)).backward()
    assert not meter.open
    assert meter.num_left == len(meter.seen) > 0
