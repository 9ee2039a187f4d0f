"""Conversion between DTensors and the local parts of this rank."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from gradselect.usage import UsageError

Groups = tuple[Any, ...]
"""The process groups over which a tensor is sharded; empty for a replica."""


def is_running() -> bool:
    """True under torch.distributed, even with a single rank."""
    return dist.is_available() and dist.is_initialized()


def has_other_ranks() -> bool:
    """True if this rank is not the only one."""
    return is_running() and dist.get_world_size() > 1


def is_dtensor(tensor: Tensor) -> bool:
    """True for a DTensor, of which this rank may hold a part only."""
    if type(tensor) in (Tensor, Parameter):
        return False
    # A DTensor exists only if its module was imported; importing it here would be slow.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Local part of the tensor, without a copy and without a gradient: its shard, or all of it."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # pyright: ignore[reportAttributeAccessIssue]


def as_dtensor(part: Tensor, *, like: Tensor) -> Tensor:
    """Return the DTensor with local part `part`, laid out as `like`; `part` itself if `like` is a plain tensor."""
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    mesh, device = like.device_mesh, part.device
    whole = DTensor.from_local(
        part.to(mesh.device_type), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole.to(device)


def local_part_like(value: Tensor, *, like: Tensor) -> Tensor:
    """Local part of a saved tensor, which is whole or laid out as `like`.

    Raises:
        UsageError: it is sharded differently from `like`.
    """
    if not is_dtensor(value):
        if not is_dtensor(like) or value.shape != like.shape:
            return value
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(like, DTensor)
        mesh = like.device_mesh
        # None: each rank has the whole value and takes its local part without communication.
        return local_part(distribute_tensor(value.to(mesh.device_type), mesh, like.placements, src_data_rank=None))
    if not is_dtensor(like) or value.placements != like.placements:  # pyright: ignore[reportAttributeAccessIssue]
        raise UsageError(
            "the saved state is not sharded as the model is; save and load it with "
            "gradselect.integrations.distributed.save and .load, which reshard"
        )
    return local_part(value)


def shard_groups(tensor: Tensor) -> Groups:
    """Process groups over which the tensor is sharded: one for each mesh axis that shards it."""
    if not is_dtensor(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # pyright: ignore[reportAttributeAccessIssue]
    return tuple(mesh.get_group(axis) for axis, placement in enumerate(placements) if not placement.is_replicate())


def local_start(tensor: Tensor, *, name: str) -> int:
    """Flat index in the whole tensor of the first entry of the local part, which is contiguous there.

    Raises:
        UsageError: it is not contiguous, because the tensor is sharded in another dimension than its first.
    """
    if not shard_groups(tensor):
        return 0
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements  # pyright: ignore[reportAttributeAccessIssue]
    for placement in placements:
        if not placement.is_replicate() and (type(placement) is not Shard or placement.dim != 0):
            raise UsageError(
                f"{name!r} is placed as {placement}, and entries are selected only in tensors that are sharded by "
                "rows; leave shard_placement_fn and tensor parallelism out"
            )
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return min(offset[0], tensor.shape[0]) * (tensor.numel() // max(1, tensor.shape[0]))


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor, without a gradient. All ranks call it."""
    if not is_dtensor(tensor):
        return tensor.detach()
    with torch.no_grad(), naming_the_collective("gathering a weight"):
        return tensor.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]


def is_averaged_in_hooks(parameter: Tensor) -> bool:
    """True if hooks on the accumulated gradient see it averaged over ranks, as those of a DTensor do.

    DistributedDataParallel averages later; gradients that FSDP2 offloads may not have arrived yet.
    """
    return is_dtensor(parameter) and collective_device(parameter).type == parameter.device.type


def collective_device(tensor: Tensor) -> torch.device:
    """Device of the tensor's collectives; FSDP2 may offload its shards to another one."""
    kind = tensor.device_mesh.device_type if is_dtensor(tensor) else tensor.device.type  # pyright: ignore
    is_there = tensor.device.type == kind
    return tensor.device if is_there else torch.device(kind, torch.accelerator.current_device_index())


@contextmanager
def naming_the_collective(doing: str) -> Iterator[None]:
    """Name the collective in the error if another rank has ended or does not answer in time."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()} stopped while {doing}: another process has ended or does not answer; its output "
            f"shows the first error ({error})"
        ) from error
