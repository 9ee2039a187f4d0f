"""Patch: the weights that steps have moved, under the names of a saved checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Entries(NamedTuple):
    """Entries of one tensor: a pair of flat indices and the weights there.

    Attributes:
        indices: flat, ascending, int32; int64 in tensors of more than 2^31 entries. Shape (n,).
        values: weights at the indices, in the dtype of the tensor. Shape (n,).

    Example:
        >>> indices, values = Entries(torch.tensor([0, 3], dtype=torch.int32), torch.tensor([1.0, 2.0]))
        >>> values
        tensor([1., 2.])
    """

    indices: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Patch(Mapping[str, Entries | Tensor]):
    """Weights that have moved between two steps, by the name of the tensor in a saved checkpoint.

    A value is `Entries`, a pair (indices, values), or the whole tensor, whichever takes fewer bytes. Tensors that did
    not move are absent. The tensors of a patch are copies: later steps do not change them.

    Attributes:
        changes: what the mapping holds.
        shapes: shape of each of these tensors.
        tied: other names of tied tensors, each with the name that the patch uses.
        from_step: number of steps that the weights to be patched have seen.
        to_step: number of steps that they have seen after that.
        model_bytes: bytes of all weights of the model, tied ones once.

    Example:
        >>> import gradselect as gs
        >>> model = torch.nn.Linear(4, 4, bias=False)
        >>> optimizer = gs.SparseOptimizer(model, gs.TopGradient(density=0.25), lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> patch = optimizer.changed_entries()
        >>> patch["weight"].indices.dtype, patch.num_entries, patch.num_bytes, patch.model_bytes
        (torch.int32, 4, 32, 64)
    """

    changes: Mapping[str, Entries | Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str] = field(default_factory=dict)
    from_step: int
    to_step: int
    model_bytes: int

    def __getitem__(self, name: str) -> Entries | Tensor:
        return self.changes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    @property
    def num_entries(self) -> int:
        """Number of weights in the patch."""
        return sum((each if isinstance(each, Tensor) else each.values).numel() for each in self.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of indices and weights: the payload."""
        tensors = [tensor for each in self.values() for tensor in ((each,) if isinstance(each, Tensor) else each)]
        return sum(tensor.nbytes for tensor in tensors)

    def names_of(self, name: str) -> tuple[str, ...]:
        """Return all names of a tensor of the patch: its own, then those that are tied to it."""
        return (name, *(alias for alias, first in self.tied.items() if first == name))

    def to(self, device: torch.device | str) -> Patch:
        """Return the patch with its tensors on another device."""
        moved = {
            name: each.to(device)
            if isinstance(each, Tensor)
            else Entries(each.indices.to(device), each.values.to(device))
            for name, each in self.items()
        }
        return replace(self, changes=moved)

    def __repr__(self) -> str:
        num_whole = sum(isinstance(each, Tensor) for each in self.values())
        share = self.num_bytes / self.model_bytes if self.model_bytes else 0.0
        return (
            f"Patch(steps {self.from_step} to {self.to_step}: {num_whole} tensors whole, {len(self) - num_whole} by "
            f"entries, {self.num_bytes:,} of {self.model_bytes:,} bytes, {share:.2%})"
        )


def index_dtype(num_entries: int) -> torch.dtype:
    """Return the smaller of int32 and int64 that holds every flat index of a tensor of `num_entries` entries."""
    return torch.int32 if num_entries <= 2**31 else torch.int64


def is_smaller_whole(num_moved: int, num_entries: int, itemsize: int) -> bool:
    """True if the whole tensor takes no more bytes than this number of its entries with their indices."""
    return num_moved * (index_dtype(num_entries).itemsize + itemsize) >= num_entries * itemsize
