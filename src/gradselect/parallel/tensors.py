"""Local parts of tensors: what this rank holds of a DTensor, and the way back."""

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
    """Whether this process is one of several, or of one under torch.distributed."""
    return dist.is_available() and dist.is_initialized()


def is_one_of_many() -> bool:
    """Whether there are other processes."""
    return is_running() and dist.get_world_size() > 1


# Shards ----------------------------------------------------------------------------------------------------------


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor: this process may hold a part of it only."""
    if type(tensor) in (Tensor, Parameter):
        return False
    # Whoever made a DTensor has imported its module, which is slow to import.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of the tensor, without a copy and without a gradient: its shard, or all of it."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # pyright: ignore[reportAttributeAccessIssue]


def as_dtensor(part: Tensor, *, like: Tensor) -> Tensor:
    """The DTensor of which every process holds a `part`, laid out as `like`; plain tensors stay as they are."""
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    mesh, device = like.device_mesh, part.device
    whole = DTensor.from_local(
        part.to(mesh.device_type), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole.to(device)


def local_part_of(value: Tensor, *, like: Tensor) -> Tensor:
    """This process' part of a saved tensor, which is whole or laid out as `like`.

    Raises:
        UsageError: it is spread over other processes than `like`.
    """
    if not is_dtensor(value):
        if not is_dtensor(like) or value.shape != like.shape:
            return value
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(like, DTensor)
        mesh = like.device_mesh
        # None: every process has the whole value and takes its own part, without a word to the others.
        return local_part(distribute_tensor(value.to(mesh.device_type), mesh, like.placements, src_data_rank=None))
    if not is_dtensor(like) or value.placements != like.placements:  # pyright: ignore[reportAttributeAccessIssue]
        raise UsageError(
            "the saved state is sharded otherwise than the model; save and load it with "
            "gradselect.integrations.distributed.save and .load, which reshard"
        )
    return local_part(value)


def shard_groups(tensor: Tensor) -> Groups:
    """The process groups over which the tensor is sharded, one per dimension of its mesh that shards it."""
    if not is_dtensor(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # pyright: ignore[reportAttributeAccessIssue]
    return tuple(mesh.get_group(axis) for axis, placement in enumerate(placements) if not placement.is_replicate())


def first_index(tensor: Tensor, *, name: str) -> int:
    """Flat index in the whole tensor of the first entry that this process holds; the others follow it.

    Raises:
        UsageError: it holds no such piece, because the tensor is sharded in another dimension than its first.
    """
    if not shard_groups(tensor):
        return 0
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements  # pyright: ignore[reportAttributeAccessIssue]
    for placement in placements:
        if not placement.is_replicate() and (type(placement) is not Shard or placement.dim != 0):
            raise UsageError(
                f"{name!r} is placed as {placement}, and single weights are selected in tensors that are sharded by "
                "rows; leave shard_placement_fn and tensor parallelism out"
            )
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return min(offset[0], tensor.shape[0]) * (tensor.numel() // max(1, tensor.shape[0]))


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, without a gradient; every process calls it."""
    if not is_dtensor(tensor):
        return tensor.detach()
    with torch.no_grad(), naming_the_collective("gathering a weight"):
        return tensor.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]


def is_averaged_in_hooks(parameter: Tensor) -> bool:
    """Whether hooks on its accumulated gradient see what the processes have averaged: those of a DTensor do.

    DistributedDataParallel averages later; what FSDP2 offloads may still be on its way.
    """
    return is_dtensor(parameter) and collective_device(parameter).type == parameter.device.type


def collective_device(tensor: Tensor) -> torch.device:
    """Where the backend of the tensor's processes works; FSDP2 can offload shards elsewhere."""
    kind = tensor.device_mesh.device_type if is_dtensor(tensor) else tensor.device.type  # pyright: ignore
    here = tensor.device.type == kind
    return tensor.device if here else torch.device(kind, torch.accelerator.current_device_index())


@contextmanager
def naming_the_collective(doing: str) -> Iterator[None]:
    """Around a collective: says what it was when another process has ended, or does not answer in time."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()} could not go on {doing}: another process has ended or does not answer; the first "
            f"error is in its output ({error})"
        ) from error
