"""Exact sums over shards: gradient norms and counts of the whole from the parts that each rank holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from .tensors import Groups, collective_device, naming_the_collective, shard_groups

# Decisions -------------------------------------------------------------------------------------------------------


class SquareSums:
    """Sums of squares of the gradients of named sets of parameters: of what this process holds, then of the whole.

    Args:
        norm: L2 norm, of shape (), of the gradients of some parameters as far as this process holds them.
    """

    def __init__(self, norm: Callable[[Sequence[Parameter]], Tensor]) -> None:
        self._norm = norm
        self._sums: dict[str, dict[Groups, Tensor]] = {}

    def measure(self, name: str, parameters: Sequence[Parameter], *, scale: float) -> None:
        """Sum of squares of the gradients divided by `scale`, instead of an earlier one of this name."""
        apart: dict[Groups, list[Parameter]] = {}
        for parameter in parameters:
            apart.setdefault(shard_groups(parameter), []).append(parameter)
        # In fp64 the root gives back the very norm that one process would have found.
        self._sums[name] = {
            groups: (self._norm(several).to(collective_device(several[0])).double() / scale).square()
            for groups, several in apart.items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def clear(self) -> None:
        """Forget all."""
        self._sums = {}

    def norms(self, names: Sequence[str]) -> dict[str, float]:
        """Norms of the whole tensors, the same number on every process: one all-reduce, and a broadcast to replicas."""
        if not names:
            return {}
        kinds = dict.fromkeys(groups for name in names for groups in self._sums[name])
        some = next(iter(self._sums[names[0]].values()))
        totals = torch.zeros(len(names), dtype=torch.float64, device=some.device)
        with naming_the_collective("adding up gradient norms"):
            for groups in kinds:
                zero = torch.zeros_like(some)
                sums = torch.stack([self._sums[name].get(groups, zero) for name in names])
                for group in groups:
                    dist.all_reduce(sums, group=group)
                totals += sums
            if any(_size(groups) < dist.get_world_size() for groups in kinds):
                dist.broadcast(totals, src=0)
        return dict(zip(names, totals.sqrt().float().tolist(), strict=True))


def add_up(parts: Mapping[Groups, Tensor], *, device: torch.device) -> Tensor:
    """The sum of what all processes hold. On the CPU.

    Args:
        parts: of the tensors that are sharded over the same groups, what this process holds; everywhere the same keys
            in the same order.
        device: where the processes' backend works.
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
    """The sum of numbers (shape ()) of what all processes hold, in fp64, on the CPU.

    Args:
        numbers: each with a tensor that is sharded as what the number was taken from; everywhere as many.
    """
    apart: dict[Groups, list[Tensor]] = {}
    for tensor, number in numbers:
        apart.setdefault(shard_groups(tensor), []).append(number.cpu().double())
    sums = {groups: torch.stack(several).sum() for groups, several in apart.items()}
    return add_up(sums, device=collective_device(numbers[0][0]))


def _size(groups: Groups) -> int:
    size = 1
    for group in groups:
        size *= group.size()
    return size
