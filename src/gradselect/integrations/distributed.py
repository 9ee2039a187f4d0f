"""Checkpoints through torch.distributed.checkpoint: saved on some number of ranks, loaded on any other.

    from gradselect.integrations import distributed

    distributed.save("checkpoint-100", model=model, optimizer=optimizer)   # on every rank
    distributed.load("checkpoint-100", model=model, optimizer=optimizer)   # on any number of ranks

Accelerate and the Trainer save under FSDP2 through `torch.distributed.checkpoint.state_dict`. That works too, but needs
state for every parameter; this module writes only the state that exists.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from gradselect import BlockOptimizer, SparseOptimizer, UsageError

PLAIN = "optimizer.plain"
STATE = "optimizer.state."


def save(folder: str | Path, *, model: nn.Module, optimizer: BlockOptimizer | SparseOptimizer) -> None:
    """Write weights and everything that decides the next step. Every rank calls it and writes its local parts.

    Args:
        folder: created if missing, on storage that all ranks share.
        model: plain, sharded by `fully_shard`, or replicated by `replicate` or DistributedDataParallel.
        optimizer: optimizer of that model.

    Example:
        >>> import gradselect as gs
        >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        >>> optimizer = gs.BlockOptimizer(model, gs.All(), lr=1e-3)
        >>> save("checkpoint-0", model=model, optimizer=optimizer)
        >>> load("checkpoint-0", model=model, optimizer=optimizer)
    """
    saved = optimizer.state_dict()
    names = _names(optimizer)
    with_state = saved["selection"].pop("with_state", names)
    saved["param_groups"][0].pop("selection", None)
    tensors: dict[str, Any] = {
        f"{STATE}{names[number]}.{kind}": value
        for number, state in saved.pop("state").items()
        if names[number] in with_state
        for kind, value in state.items()
    }
    tensors[PLAIN] = _as_tensor(saved)
    with _quiet():
        state_dict_saver.save({**_weights(model), **tensors}, checkpoint_id=folder)


def load(folder: str | Path, *, model: nn.Module, optimizer: BlockOptimizer | SparseOptimizer) -> None:
    """Restore model and optimizer from `save`. Every rank calls it; the number of ranks may differ.

    Raises:
        UsageError: the folder holds no such checkpoint, or one of another model, partition or policy.

    Example:
        >>> import gradselect as gs
        >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        >>> optimizer = gs.BlockOptimizer(model, gs.All(), lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> save("checkpoint-1", model=model, optimizer=optimizer)
        >>> load("checkpoint-1", model=model, optimizer=optimizer)
        >>> optimizer.num_steps
        1
    """
    stored = _stored_tensors(Path(folder))
    parameters = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    weights = _weights(model)
    wanted = {**weights, PLAIN: torch.empty(stored[PLAIN].size, dtype=torch.uint8)}
    for key, info in stored.items():
        if key.startswith(STATE):
            name, _ = _split(key, parameters)
            if name not in parameters:
                raise UsageError(f"{folder} holds state of {name!r}, which this optimizer does not train")
            # Every rank reads the state of all entries and keeps that of its local part.
            is_of_entries = f"{STATE}{name}.indices" in stored
            wanted[key] = _empty_whole(info) if is_of_entries else _empty(info, like=parameters[name])
    with _quiet():
        state_dict_loader.load(wanted, checkpoint_id=folder)

    set_model_state_dict(model, {key.removeprefix("model."): wanted[key] for key in weights})
    numbers = {name: number for number, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in wanted.items():
        if key.startswith(STATE):
            name, kind = _split(key, parameters)
            state.setdefault(numbers[name], {})[kind] = value
    optimizer.load_state_dict({**json.loads(bytes(wanted[PLAIN].tolist())), "state": state})


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warning about a single process, which is a supported case."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _split(key: str, parameters: Collection[str]) -> tuple[str, str]:
    """Return the names of the parameter and of the tensor in its state; both may hold dots."""
    whole = name = key.removeprefix(STATE)
    while "." in name:
        name = name.rpartition(".")[0]
        if name in parameters:
            return name, whole.removeprefix(f"{name}.")
    return whole.rpartition(".")[0], whole.rpartition(".")[2]


def _weights(model: nn.Module) -> dict[str, Any]:
    return {f"model.{name}": value for name, value in get_model_state_dict(model).items()}


def _names(optimizer: BlockOptimizer | SparseOptimizer) -> list[str]:
    """Return the names of the parameters in the order of their numbers in a state_dict."""
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def _as_tensor(plain: Any) -> Tensor:
    """Broadcast plain values from rank 0, as bytes: a checkpoint of tensors only needs no unpickling."""
    text = [json.dumps(plain)]
    if dist.is_initialized():
        dist.broadcast_object_list(text, src=0)
    return torch.tensor(list(text[0].encode()), dtype=torch.uint8)


def _stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    if not (folder / ".metadata").exists():
        raise UsageError(f"{folder} holds no checkpoint of gradselect.integrations.distributed.save")
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {key: info for key, info in metadata.items() if isinstance(info, TensorStorageMetadata)}
    if PLAIN not in tensors:
        raise UsageError(f"{folder} was not written by gradselect.integrations.distributed.save: it lacks {PLAIN!r}")
    return tensors


def _empty(info: TensorStorageMetadata, *, like: Tensor) -> Tensor:
    """Return an empty tensor to load into, sharded like its weight if it has the weight's shape.

    On the host: on the device it would stand beside the state of all other blocks, most of which may be offloaded.
    """
    if info.size == like.shape:
        return torch.empty_like(like, dtype=info.properties.dtype, device="cpu", requires_grad=False)
    return _empty_whole(info)


def _empty_whole(info: TensorStorageMetadata) -> Tensor:
    return torch.empty(info.size, dtype=info.properties.dtype)
