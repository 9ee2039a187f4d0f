"""Several gloo processes on one machine, and a tiny model of torch modules that they train.

A job is a function `job(rank, **settings)` of a test module. Processes are forked from a server that has imported what
jobs need and nothing else has happened to, so a job starts in a moment.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

import gradselect as gs

VOCABULARY = 11
HIDDEN = 6  # not a multiple of 4 or of 3 * 2: shards are uneven
ROWS = 6  # of a global micro-batch: divides by 1, 2 and 3 processes
LENGTH = 4
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = (
    "torch",
    "torch._dynamo",  # which the first step of any optimizer loads
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "gradselect.public_names",  # `import gradselect` alone loads nothing
    "gradselect.integrations.distributed",
    "pytest",
)
CONTEXT.set_forkserver_preload(list(PRELOADED))


class TinyModel(nn.Module):
    """A language model: token embedding, residual layers, a norm, a head."""

    def __init__(self, *, layers: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(TinyLayer() for _ in range(layers))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token loss of tokens (2, 4)."""
        hidden = self.tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(self.norm(hidden))[:, :-1].flatten(0, 1)
        # bf16 logits in fp32, as models do; fp64 as it is
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(logits, tokens[:, 1:].flatten())


class TinyLayer(nn.Module):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.tanh(self.up(hidden)))


def tiny(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyModel:
    torch.manual_seed(seed)
    return TinyModel().to(dtype)


def rows(number: int, *, rank: int, world: int) -> Tensor:
    """This process' rows of the global micro-batch of this number."""
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(number))
    return tokens.chunk(world)[rank]


def train(
    model: nn.Module,
    optimizer: gs.BlockOptimizer,
    *,
    steps: int,
    rank: int = 0,
    world: int = 1,
    accumulation: int = 2,
    clip: float | None = 0.5,
    first: int = 0,
    sync: str = "every",
) -> list[gs.StepRecord]:
    """Steps of the usual loop; the records. With sync="last" only the last micro-batch of a step reduces gradients."""
    records: list[gs.StepRecord] = []
    handle = optimizer.add_record_hook(records.append)
    for step in range(first, first + steps):
        for micro in range(accumulation):
            if sync == "last":
                model.set_requires_gradient_sync(micro == accumulation - 1)
            loss = model(rows(accumulation * step + micro, rank=rank, world=world))
            (loss / accumulation).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    return records


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name as one process would hold them; a collective."""
    return {
        name.removeprefix("module."): (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)
        .detach()
        .clone()
        for name, parameter in model.named_parameters()
    }


def launch(job: Callable[..., Any], *, world: int, timeout: float = 60, **settings: Any) -> list[Any]:
    """What `job(rank, **settings)` returned on each process, or the exception, in order of ranks.

    Raises:
        TimeoutError: after `timeout` seconds; the processes are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=_work, args=(job, rank, world, folder, settings), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        if hanging:
            raise TimeoutError(f"ranks {hanging} of {job.__name__} still ran after {timeout} s")
        return [_result(Path(folder) / f"{rank}.pt") for rank in range(world)]


def succeed(job: Callable[..., Any], *, world: int, **settings: Any) -> list[Any]:
    """As `launch`; no process failed."""
    results = launch(job, world=world, **settings)
    for result in results:
        assert not isinstance(result, Failure), result.trace
    return results


def succeed_each(jobs: dict[Callable[..., Any], dict[str, Any]], *, world: int) -> dict[Callable[..., Any], list[Any]]:
    """As `succeed` for each of the jobs with its settings, one after another in the same processes."""
    results = succeed(_one_after_another, world=world, timeout=60 * len(jobs), jobs=list(jobs.items()))
    return {job: list(of_ranks) for job, of_ranks in zip(jobs, zip(*results, strict=True), strict=True)}


def _one_after_another(rank: int, *, jobs: list[tuple[Callable[..., Any], dict[str, Any]]]) -> list[Any]:
    return [job(rank, **settings) for job, settings in jobs]


class Failure:
    """How a job ended that raised.

    Attributes:
        kind: name of the exception's class.
        message: what it said.
    """

    def __init__(self, kind: str, message: str, trace: str) -> None:
        self.kind, self.message, self.trace = kind, message, trace


def _work(job: Callable[..., Any], rank: int, world: int, folder: str, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    try:
        result = job(rank, **settings)
    except Exception as error:
        result = Failure(type(error).__name__, str(error), traceback.format_exc())
    torch.save(result, f"{folder}/{rank}.new")
    os.replace(f"{folder}/{rank}.new", f"{folder}/{rank}.pt")
    # Not destroy_process_group: it waits for ranks that have failed.
    os._exit(0)


def _result(path: Path) -> Any:
    if not path.exists():
        return Failure("Killed", "the process ended without a result", "")
    return torch.load(path, weights_only=False)
