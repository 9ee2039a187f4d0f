"""Ages of entries: numbers of updates, without a counter for each entry."""

from __future__ import annotations

import torch
from torch import Tensor

from gradselect.core import Ages


class Cohorts:
    """Counts updates of the entries of several tensors.

    The entries of a tensor are in the order in which they joined. Those that joined at the same update of their tensor
    are a *cohort* and share their age. Counting needs no byte per entry: the sign bit of an index marks the first entry
    of a cohort (such indices are called flagged), and one bit per tensor and update marks that a cohort joined then.

    Attributes:
        num_updates: number of updates of each tensor.

    Args:
        num_tensors: number of tensors; a tensor is addressed by its position.
        index_dtype: int32 or int64.
        device: of the indices.
    """

    def __init__(self, num_tensors: int, *, index_dtype: torch.dtype, device: torch.device) -> None:
        self.num_updates = [0] * num_tensors
        self._sign_bit = torch.iinfo(index_dtype).min
        self._joined = torch.zeros(num_tensors, 0, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the cohort bits on the device."""
        return self._joined.nbytes

    def move_to(self, device: torch.device) -> None:
        """Move to the device of the indices."""
        self._joined = self._joined.to(device)

    def plain(self, flagged: Tensor) -> Tensor:
        """Return the indices without flags."""
        return flagged & ~self._sign_bit

    def join(self, position: int, indices: Tensor) -> Tensor:
        """Let entries join at the end of their tensor; return their flagged indices, shape (n,), n >= 1."""
        flagged = indices.clone()
        byte, bit = divmod(self.num_updates[position], 8)
        self._widen(byte + 1)
        # No update since the last entries joined: these belong to the same cohort.
        if not int(self._joined[position, byte]) >> bit & 1:
            flagged[0] |= self._sign_bit
        self._joined[position, byte] |= 1 << bit
        return flagged

    def joined_at(self, position: int, flagged: Tensor) -> Tensor:
        """Number of updates of the tensor before each of its entries joined. Shape (n,), int64."""
        _, joined = self._list(slice(position, position + 1))
        return joined[self._ordinals(flagged)]

    def rewrite(self, position: int, indices: Tensor, joined_at: Tensor) -> Tensor:
        """Replace the cohorts of a tensor; return its flagged indices.

        Args:
            position: of the tensor.
            indices: of all its entries, flagged or not. Shape (n,).
            joined_at: as the method `joined_at` returns it, ascending. Shape (n,).
        """
        begins = torch.ones_like(joined_at, dtype=torch.bool)
        begins[1:] = joined_at[1:] != joined_at[:-1]
        updates = joined_at[begins].long()
        self._widen(int(updates[-1]) // 8 + 1 if updates.numel() else 0)
        bits = self._joined.new_zeros(self._joined.shape[1], 8)
        bits.view(-1)[updates] = 1
        self._joined[position] = (bits << torch.arange(8, device=bits.device, dtype=torch.uint8)).sum(1)
        plain = self.plain(indices)
        return torch.where(begins, plain | self._sign_bit, plain)

    def ages(self, positions: range, flagged: Tensor) -> Ages:
        """Ages of all entries of neighbouring tensors, which hold at least one entry.

        Args:
            positions: of the tensors.
            flagged: indices of their entries, tensor after tensor. Shape (n,).
        """
        counts = [self.num_updates[position] for position in positions]
        rows, joined = self._list(slice(positions.start, positions.stop))
        ages = (torch.tensor(counts).to(rows.device)[rows] - joined).int()
        if bool((ages == ages[0]).all()):
            return Ages(ages[:1], most=max(counts))
        return Ages(ages.index_select(0, self._ordinals(flagged)), most=max(counts))

    def forget(self) -> None:
        """Drop all cohorts."""
        self._joined = torch.zeros_like(self._joined[:, :0])

    def _list(self, positions: slice) -> tuple[Tensor, Tensor]:
        """Return for every cohort of these tensors, in order, its tensor (from 0) and the update at which it joined."""
        bits = self._joined[positions, :, None] >> torch.arange(8, device=self._joined.device, dtype=torch.uint8)
        return (bits & 1).view(bits.shape[0], -1).nonzero().unbind(1)  # pyright: ignore[reportReturnType]

    def _ordinals(self, flagged: Tensor) -> Tensor:
        """Number of each entry's cohort, counted from 0 over these entries."""
        return (flagged < 0).cumsum(0, dtype=torch.int32).sub_(1)

    def _widen(self, num_bytes: int) -> None:
        """Make room for the bits of `8 * num_bytes` updates."""
        missing = num_bytes - self._joined.shape[1]
        if missing > 0:
            self._joined = torch.nn.functional.pad(self._joined, (0, missing))
