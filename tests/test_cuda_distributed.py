"""torch.distributed on a GPU: one rank on NCCL trains as a loop without wrappers does on the same GPU.

One rank has the streams, hooks and collectives of many; what only several have, order and sums, is tested on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_support import rows, tiny, whole
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradselect as gs
from gradselect.integrations import distributed

DEVICE, BACKEND = "cuda", "nccl"
NUM_STEPS = 8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make gpu"),
    pytest.mark.filterwarnings("ignore"),  # of torch about a single process
]

MAKE: dict[str, Callable[[nn.Module], Any]] = {
    "blocks": lambda model: gs.BlockOptimizer(
        model, gs.AdaGradSelect(count=2, explore_steps=4), lr=1e-2, residency=gs.Offload(), accumulation_steps=2
    ),
    "entries": lambda model: gs.SparseOptimizer(
        model, gs.ID3(budget=90, steps=6), lr=1e-2, max_grad_norm=0.3, accumulation_steps=2
    ),
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group(BACKEND, store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: Any, *, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model, **({} if policy is None else {"mp_policy": policy}))


WRAP: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fully_shard": sharded,
    "fully_shard, loss cast": lambda model: sharded(model, policy=MixedPrecisionPolicy(output_dtype=torch.float32)),
    "ddp": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
}


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        for part in range(2):
            (model(rows(2 * step + part, rank=0, world=1).to(DEVICE)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def model_here() -> nn.Module:
    return tiny(dtype=torch.float64).to(DEVICE)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    """Weights of a loop without torch.distributed, by optimizer; made before there is a group."""
    ends = {}
    for name, make in MAKE.items():
        model = model_here()
        train(model, make(model), range(NUM_STEPS))
        ends[name] = whole(model)
    return ends


@pytest.mark.parametrize("wrapper", WRAP)
@pytest.mark.parametrize("name", MAKE)
def test_wrapped_it_trains_as_alone(name: str, wrapper: str, alone: dict[str, Any], one_rank: None) -> None:
    model = WRAP[wrapper](model_here())
    train(model, MAKE[name](model), range(NUM_STEPS))
    for key, weight in whole(model).items():
        torch.testing.assert_close(
            weight, alone[name][key], rtol=1e-9, atol=1e-12, msg=lambda text, k=key: f"{k}: {text}"
        )


@pytest.mark.parametrize("name", MAKE)
def test_saved_and_loaded_it_goes_on(name: str, alone: dict[str, Any], one_rank: None, tmp_path: Path) -> None:
    model = sharded(model_here())
    optimizer = MAKE[name](model)
    train(model, optimizer, range(5))
    distributed.save(tmp_path / "checkpoint", model=model, optimizer=optimizer)
    other = sharded(model_here())
    optimizer = MAKE[name](other)
    distributed.load(tmp_path / "checkpoint", model=other, optimizer=optimizer)
    assert optimizer.num_steps == 5
    train(other, optimizer, range(5, NUM_STEPS))
    for key, weight in whole(other).items():
        torch.testing.assert_close(
            weight, alone[name][key], rtol=1e-9, atol=1e-12, msg=lambda text, k=key: f"{k}: {text}"
        )
