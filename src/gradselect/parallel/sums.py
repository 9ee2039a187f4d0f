"""Exact sums over shards: gradient norms and counts of whole tensors from the local parts of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from .tensors import Groups, collective_device, naming_the_collective, shard_groups


class NormSums:
    """Gradient norms of named sets of parameters, summed first over local parts, then over ranks.

    Args:
        norm: returns the norm, shape (), of the local gradients of some parameters.
        adds_squares: True for an L2 norm, of which squares add up; False for one that adds up itself, as an L1 norm.
    """

    def __init__(self, norm: Callable[[Sequence[Parameter]], Tensor], *, adds_squares: bool) -> None:
        self._norm = norm
        self._adds_squares = adds_squares
        self._sums: dict[str, dict[Groups, Tensor]] = {}

    def measure(self, name: str, parameters: Sequence[Parameter], *, scale: float) -> None:
        """Store what adds up, of the gradients divided by `scale`, replacing an earlier number of this name."""
        apart: dict[Groups, list[Parameter]] = {}
        for parameter in parameters:
            apart.setdefault(shard_groups(parameter), []).append(parameter)
        # In fp64, so that the root is exactly the norm that a single rank would find.
        self._sums[name] = {
            groups: self._summand(self._norm(several).to(collective_device(several[0])).double() / scale)
            for groups, several in apart.items()
        }

    def _summand(self, norm: Tensor) -> Tensor:
        return norm.square() if self._adds_squares else norm

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def clear(self) -> None:
        """Forget all sums."""
        self._sums = {}

    def norms(self, names: Sequence[str]) -> dict[str, float]:
        """Norms of the whole gradients, equal on all ranks: all-reduces over shards, and for replicas a broadcast."""
        if not names:
            return {}
        shardings = dict.fromkeys(groups for name in names for groups in self._sums[name])
        first = next(iter(self._sums[names[0]].values()))
        totals = torch.zeros(len(names), dtype=torch.float64, device=first.device)
        with naming_the_collective("adding up gradient norms"):
            for groups in shardings:
                zero = torch.zeros_like(first)
                sums = torch.stack([self._sums[name].get(groups, zero) for name in names])
                for group in groups:
                    dist.all_reduce(sums, group=group)
                totals += sums
            if any(_size(groups) < dist.get_world_size() for groups in shardings):
                dist.broadcast(totals, src=0)
        norms = totals.sqrt() if self._adds_squares else totals
        return dict(zip(names, norms.float().tolist(), strict=True))


def sum_over_ranks(parts: Mapping[Groups, Tensor], *, device: torch.device) -> Tensor:
    """Sum of the local parts of all ranks, on the CPU.

    Args:
        parts: local sums, by the process groups over which their tensors are sharded; all ranks pass the same keys in
            the same order.
        device: device of the collectives.
    """
    totals = []
    for groups, part in parts.items():
        total = part.to(device, copy=True) if groups else part
        with naming_the_collective("adding up"):
            for group in groups:
                dist.all_reduce(total, group=group)
        totals.append(total.cpu())
    return torch.stack(totals).sum(0)


def total(numbers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of local numbers (shape ()) over all ranks, in fp64, on the CPU.

    Args:
        numbers: each after a tensor that is sharded like the tensor of the number; all ranks pass equally many.
    """
    if not numbers:
        return torch.zeros((), dtype=torch.float64)
    apart: dict[Groups, list[Tensor]] = {}
    for tensor, number in numbers:
        apart.setdefault(shard_groups(tensor), []).append(number.cpu().double())
    sums = {groups: torch.stack(several).sum() for groups, several in apart.items()}
    return sum_over_ranks(sums, device=collective_device(numbers[0][0]))


def _size(groups: Groups) -> int:
    size = 1
    for group in groups:
        size *= group.size()
    return size
