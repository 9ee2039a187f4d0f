"""Slices on several processes: replicas train as one process, shards are refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from distributed_support import launch, rows, succeed, tiny, train, whole
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradselect as gs

CASES = (("columns", False), ("rows", True))
"""Kind of the slices; True if the model is wrapped after the optimizer was built."""


def run(*, by: Any, late: bool, rank: int = 0, world: int = 1) -> Any:
    """Return selections and weights of a run."""
    model: nn.Module = tiny(dtype=torch.float64)
    blocks = gs.partition(model, by=by, parts=3)
    if world > 1 and not late:
        model = DistributedDataParallel(model, find_unused_parameters=True)
    policy = gs.AdaGradSelect(count=3, explore_steps=5, delta=5.0)
    optimizer = gs.BlockOptimizer(model, policy, blocks=blocks, lr=1e-2, accumulation_steps=2)
    if world > 1 and late:
        model = DistributedDataParallel(model, find_unused_parameters=True)
    records = train(model, optimizer, steps=10, rank=rank, world=world)
    return [record.selected for record in records], whole(model)


def replicas(rank: int) -> list[Any]:
    return [run(by=by, late=late, rank=rank, world=dist.get_world_size()) for by, late in CASES]


def test_replicas_train_as_one_process() -> None:
    expected = [run(by=by, late=late) for by, late in CASES]
    for found in succeed(replicas, world=2):
        for (selected, weights), (other_selected, other_weights) in zip(found, expected, strict=True):
            assert selected == other_selected
            assert all(
                torch.allclose(value, other_weights[name], rtol=0, atol=1e-12) for name, value in weights.items()
            )


def shard_first() -> None:
    model = fully_shard(tiny())
    gs.partition(model, by="rows", parts=3)


def cut_first() -> None:
    model = tiny()
    gs.partition(model, by="rows", parts=3)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)(rows(0, rank=0, world=1))


def cut_before_and_after() -> None:
    model = tiny()
    gs.partition(model, by="rows", parts=3)
    fully_shard(model)
    gs.partition(model, by="rows", parts=3)


def wrap_first() -> None:
    gs.partition(DistributedDataParallel(tiny()), by="rows", parts=3)


def refusals(rank: int) -> list[str]:
    """Return the message of each wrong set-up."""
    messages = []
    for wrong in (shard_first, cut_first, cut_before_and_after, wrap_first):
        try:
            wrong()
        except gs.UsageError as error:
            messages.append(str(error))
    return messages


def test_shards_and_late_cuts_are_refused() -> None:
    """torch itself refuses to shard columns, which are not contiguous."""
    *of_shards, of_wrapper = succeed(refusals, world=1)[0]
    assert len(of_shards) == 3
    assert all("Slices work on one device and under DistributedDataParallel" in message for message in of_shards)
    assert 'call partition(model, by="rows") first, then wrap the model' in of_wrapper


def columns_in_shards(rank: int) -> None:
    model = tiny()
    gs.partition(model, by="columns", parts=3)
    fully_shard(model)


def test_torch_does_not_shard_columns() -> None:
    (failure,) = launch(columns_in_shards, world=1)
    assert "FSDP does not support non-contiguous parameters" in failure.trace
