"""Steps whose gradients hold NaN or infinity: skipped on request, as if their batch had never been.

And `grad_norm`, by which they are found: the norm that torch computes of the same gradients.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_support import rows, succeed_each, tiny, whole
from policy_support import through_torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradselect as gs

BAD = {0, 3, 4}
"""Numbers of the batches whose gradients are broken, among those below."""
NUM_BATCHES = 9

Build = Callable[..., tuple[nn.Module, Any]]


def blocks(policy: gs.AbstractPolicy, *, dtype: torch.dtype = torch.float32, **options: Any) -> Build:
    def build(*, skips: bool = True) -> tuple[nn.Module, gs.BlockOptimizer]:
        model = tiny(dtype=dtype)
        return model, gs.BlockOptimizer(model, policy, lr=1e-2, skip_nonfinite=skips, **options)

    return build


def entries(mask: Any, *, dtype: torch.dtype = torch.float32, **options: Any) -> Build:
    def build(*, skips: bool = True) -> tuple[nn.Module, gs.SparseOptimizer]:
        model = tiny(dtype=dtype)
        return model, gs.SparseOptimizer(model, mask, lr=1e-2, skip_nonfinite=skips, **options)

    return build


CASES: dict[str, Build] = {
    "all": blocks(gs.All()),
    "explore steps": blocks(gs.AdaGradSelect(count=2, explore_steps=3, delta=9.0)),
    "every norm": blocks(gs.GradNormTopK(count=2)),
    "drawn": blocks(gs.Uniform(count=2), always="norm", residency=gs.Offload()),
    "masters": blocks(gs.MISA(share=0.4, every=2), dtype=torch.bfloat16, residency=gs.Offload()),
    "accumulation": blocks(gs.Cyclic(every=1), accumulation_steps=2, rule=gs.SGDRule()),
    "id3": entries(gs.ID3(budget=60, steps=6), max_grad_norm=0.5),
    "id3, always": entries(gs.ID3(budget=60, steps=6), always="norm.*", dtype=torch.bfloat16),
    "static, from the first gradient": entries(gs.StaticMask(budget=40)),
    "static, refreshed": entries(gs.StaticMask(budget=40, refresh_every=2), accumulation_steps=2),
    "lean": entries(gs.ID3(budget=60, steps=6), accumulation_steps=2, lean_accumulation=True),
    "top gradient": entries(gs.TopGradient(density=0.1), rule=gs.SGDRule()),
    "lift": entries(gs.LIFT(rank=1, refresh_every=2)),
    "bitfit": entries(gs.BitFit()),
    "gmt": entries(gs.GMT(fraction=0.3), dtype=torch.bfloat16),
    "gmt, update": entries(gs.GMT(fraction=0.3, mask="update"), accumulation_steps=2),
}


def backward(model: nn.Module, optimizer: Any, number: int, *, factor: float = 1.0) -> None:
    """All passes of a batch; `factor` multiplies the loss of the first."""
    for part in range(optimizer.accumulation_steps):
        loss = model(rows(10 * number + part, rank=0, world=1))
        (loss * (1.0 if part else factor)).backward()


def train(model: nn.Module, optimizer: Any, numbers: Iterable[int], *, bad: Iterable[int] = (), factor: float = 1.0):
    for number in numbers:
        backward(model, optimizer, number, factor=factor if number in bad else 1.0)
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Everything that decides the next step, copied."""
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "trains": [parameter.requires_grad for parameter in model.parameters()],
        "state": through_torch(optimizer.state_dict()),
        "memory": optimizer.memory(),
        "record": optimizer.last_record,
    }


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("factor", [math.nan, math.inf], ids=["NaN", "infinity"])
@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_a_skipped_batch_might_as_well_not_have_been(build: Build, factor: float) -> None:
    model, optimizer = build()
    records: list[Any] = []
    optimizer.add_record_hook(records.append)
    for number in range(NUM_BATCHES):
        before = snapshot(model, optimizer)
        train(model, optimizer, [number], bad=BAD, factor=factor)
        if number in BAD:
            assert same(before, snapshot(model, optimizer)), number
        else:
            assert optimizer.num_steps == before["state"]["selection"]["step"] + 1
    twin, straight = build(skips=False)
    straight_records: list[Any] = []
    straight.add_record_hook(straight_records.append)
    train(twin, straight, [number for number in range(NUM_BATCHES) if number not in BAD])
    assert same(snapshot(model, optimizer), snapshot(twin, straight))
    assert records == straight_records
    assert optimizer.num_skipped == len(BAD)


@pytest.mark.parametrize("name", ["every norm", "id3", "static, from the first gradient", "top gradient", "gmt"])
def test_one_infinite_number_in_one_gradient_is_enough(name: str) -> None:
    """Where all gradients decide: also of a block or an entry that was not selected before."""
    model, optimizer = CASES[name]()
    train(model, optimizer, [] if "first" in name else [0, 1])
    before = snapshot(model, optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for number, parameter in enumerate(parameters, start=1):
        handle = parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), math.inf))
        train(model, optimizer, [2])
        handle.remove()
        assert optimizer.num_skipped_in_a_row == number
    assert same(before, snapshot(model, optimizer))


@pytest.mark.parametrize("build", [CASES["drawn"], CASES["id3"]], ids=["blocks", "entries"])
def test_skipped_steps_are_counted_and_logged(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = build()
    counts = []
    with caplog.at_level(logging.WARNING, logger="gradselect"):
        for number in range(7):
            train(model, optimizer, [number], bad=BAD, factor=math.nan)
            counts.append((optimizer.num_skipped, optimizer.num_skipped_in_a_row))
    assert counts == [(1, 1), (1, 0), (1, 0), (2, 1), (3, 2), (3, 0), (3, 0)]
    steps = [0, 2, 2]  # num_steps when they came
    assert [record.getMessage() for record in caplog.records] == [
        f"the gradient norm of step {step} is nan: the step is skipped and has changed nothing ({count} skipped so far)"
        for count, step in enumerate(steps, start=1)
    ]


@pytest.mark.parametrize(
    "build", [CASES["all"], CASES["bitfit"], CASES["id3, always"]], ids=["blocks", "entries", "whole"]
)
def test_by_default_a_broken_step_is_taken(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = build(skips=False)
    train(model, optimizer, [0, 1], bad=[1], factor=math.nan)
    assert optimizer.num_steps == 2
    assert optimizer.num_skipped == optimizer.num_skipped_in_a_row == 0
    assert any(parameter.isnan().any() for parameter in model.parameters())
    assert not caplog.records


def test_a_finite_run_is_bitwise_the_same_with_and_without() -> None:
    for build in CASES.values():
        (model, optimizer), (twin, straight) = build(), build(skips=False)
        train(model, optimizer, range(4))
        train(twin, straight, range(4))
        assert same(snapshot(model, optimizer), snapshot(twin, straight))
        assert optimizer.num_skipped == 0


def test_it_is_refused_where_weights_move_before_all_gradients_are_known() -> None:
    with pytest.raises(gs.UsageError, match=r"update_in_backward=True with skip_nonfinite=True.*leave one of them out"):
        blocks(gs.All(), update_in_backward=True)()
    _, optimizer = blocks(gs.All(), update_in_backward=True)(skips=False)
    with pytest.raises(gs.UsageError, match=r"update_in_backward=True with skip_nonfinite=True"):
        optimizer.skip_nonfinite = True
    assert not optimizer.skip_nonfinite


# The norm ----------------------------------------------------------------------------------------------------------


def torch_norm(gradients: Iterable[Tensor | None]) -> float:
    return float(nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None]))


@pytest.mark.parametrize("name", ["all", "every norm", "drawn", "accumulation"])
def test_the_norm_of_blocks_is_torchs_of_the_gradients_that_exist(name: str) -> None:
    model, optimizer = CASES[name]()
    assert optimizer.grad_norm == 0.0
    for number in range(3):
        backward(model, optimizer, number)
        assert optimizer.grad_norm == pytest.approx(torch_norm(p.grad for p in model.parameters()), rel=1e-6)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.grad_norm == 0.0


@pytest.mark.parametrize("name", ["id3", "id3, always", "bitfit", "gmt", "gmt, update"])
def test_the_norm_of_entries_is_torchs_of_the_set(name: str) -> None:
    """Before entries join. Under a dense mask it is that of all gradients."""
    model, optimizer = CASES[name]()
    assert optimizer.grad_norm == 0.0
    for number in range(3):
        twin = tiny(dtype=next(model.parameters()).dtype)
        twin.load_state_dict(model.state_dict())
        backward(twin, optimizer, number)
        held = optimizer.entries
        gradients = {name: p.grad.float() for name, p in twin.named_parameters() if p.grad is not None}
        if name.startswith("gmt"):
            found = list(gradients.values())
        else:
            found = [gradients[name].flatten()[indices] for name, indices in held.items()]
            found += [gradient for key, gradient in gradients.items() if key.startswith("norm.") and "always" in name]
        backward(model, optimizer, number)
        assert optimizer.grad_norm == pytest.approx(torch_norm(found) if found else 0.0, rel=1e-5)
        assert optimizer.grad_norm == optimizer.grad_norm
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.grad_norm == 0.0


# Several processes -------------------------------------------------------------------------------------------------


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    return fully_shard(model)


def shared(rank: int, *, cases: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """Train with a broken batch on the last rank only; return what each rank saw."""
    warnings.simplefilter("ignore")  # of DDP: unused parameters
    world, results = dist.get_world_size(), {}
    choices = {
        "blocks": (gs.BlockOptimizer, gs.GradNormTopK(count=2)),
        "drawn": (gs.BlockOptimizer, gs.Uniform(count=2)),
        "entries": (gs.SparseOptimizer, gs.ID3(budget=60, steps=6)),
        "dense": (gs.SparseOptimizer, gs.GMT(fraction=0.3)),
    }
    for wrapper, name in cases:
        build, choice = choices[name]
        ends = []
        for numbers in (range(6), [number for number in range(6) if number not in BAD]):
            model = wrap(tiny(dtype=torch.float64), wrapper)
            optimizer: Any = build(model, choice, lr=1e-2, skip_nonfinite=True)
            norms = []
            for number in numbers:
                loss = model(rows(number, rank=rank, world=world))
                is_bad = number in BAD and rank == world - 1
                (loss * math.nan if is_bad else loss).backward()
                found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
                norm = nn.utils.get_total_norm(found) if found else torch.zeros(())
                norms.append((optimizer.grad_norm, float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)))
                optimizer.step()
                optimizer.zero_grad()
            ends.append((whole(model), optimizer.num_steps, optimizer.num_skipped, norms))
        results[wrapper, name] = ends
    return results


SHARED = [
    *((wrapper, name) for wrapper in ("ddp", "fully_shard") for name in ("blocks", "entries")),
    *(("fully_shard", name) for name in ("drawn", "dense")),
]


@pytest.fixture(scope="module")
def pair() -> dict[Callable[..., Any], list[Any]]:
    """Results of two ranks, by job."""
    return succeed_each({shared: {"cases": SHARED}, look_before_step: {}}, world=2)


def test_all_ranks_skip_alike(pair: dict[Callable[..., Any], list[Any]]) -> None:
    """What is broken on one rank reaches the others by the average of gradients, or of a shard by the norm."""
    first, second = pair[shared]
    for case in SHARED:
        for rank in (first, second):
            (weights, steps, skipped, norms), (expected, *_) = rank[case]
            assert (steps, skipped) == (6 - len(BAD), len(BAD)), case
            assert same(weights, expected), case
            assert [number for number, (norm, _) in enumerate(norms) if not math.isfinite(norm)] == sorted(BAD)
        assert same(first[case][0][0], second[case][0][0])
        norms = [[norm for norm, _ in rank[case][0][3] if math.isfinite(norm)] for rank in (first, second)]
        assert norms[0] == pytest.approx(norms[1])
        if case[1] in ("blocks", "drawn"):
            for ours, theirs in first[case][0][3]:
                assert ours == pytest.approx(theirs, rel=1e-6, nan_ok=True)


def test_an_older_optimizer_is_refused_and_leaves_the_gradients_of_the_newer_one() -> None:
    model = tiny()
    older = gs.BlockOptimizer(model, gs.All(), lr=1e-2, skip_nonfinite=True)
    gs.BlockOptimizer(model, gs.All(), lr=1e-2)
    (model(rows(0, rank=0, world=1)) * math.nan).backward()
    with pytest.raises(gs.UsageError, match="a newer optimizer was built on this model"):
        older.step()
    assert older.num_skipped == 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def look_before_step(rank: int) -> str:
    """Read the norm on a model that nothing averages, as a meter may."""
    model = tiny()
    optimizer = gs.SparseOptimizer(model, gs.ID3(budget=60, steps=3), lr=1e-2)
    model(rows(0, rank=rank, world=dist.get_world_size())).backward()
    assert math.isfinite(optimizer.grad_norm)
    with pytest.raises(gs.UsageError, match="nothing has averaged them") as refused:
        optimizer.step()
    return str(refused.value)


def test_looking_at_the_norm_hides_no_gradient_from_the_check_of_ranks(
    pair: dict[Callable[..., Any], list[Any]],
) -> None:
    first, second = pair[look_before_step]
    assert first == second
