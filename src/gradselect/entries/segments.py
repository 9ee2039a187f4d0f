"""Segments of one flat array, which holds the entries of several tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Segments:
    """Neighbouring segments of a flat array, one for each tensor.

    Args:
        names: of the tensors, in order; all segments start empty.

    Example:
        >>> import torch
        >>> segments = Segments(["a", "b"])
        >>> array = segments.appended(torch.empty(0), {"b": torch.ones(2)})
        >>> segments.grow({"b": 2})
        >>> segments.slice_of("b"), array
        (slice(0, 2, None), tensor([1., 1.]))
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.position = {name: position for position, name in enumerate(names)}
        self._ends = [0] * len(names)

    def slice_of(self, *names: str) -> slice:
        """Return the slice of one tensor, or of several neighbouring ones."""
        first, last = self.position[names[0]], self.position[names[-1]]
        return slice(self._ends[first - 1] if first else 0, self._ends[last])

    def count(self, name: str) -> int:
        """Number of entries of the tensor."""
        part = self.slice_of(name)
        return part.stop - part.start

    def split(self, array: Tensor, names: Sequence[str]) -> Sequence[Tensor]:
        """Split an array over these neighbouring tensors into one part for each."""
        return array.split([self.count(name) for name in names])

    def appended(self, array: Tensor, additions: Mapping[str, Tensor]) -> Tensor:
        """Return `array` with `additions` at the end of their tensors' segments."""
        parts, start = [], 0
        for name in sorted(additions, key=self.position.__getitem__):
            end = self._ends[self.position[name]]
            parts += [array[start:end], additions[name].to(array.dtype)]
            start = end
        return torch.cat([*parts, array[start:]])

    def grow(self, by: Mapping[str, int]) -> None:
        """Move the ends after `by` entries were added to these tensors, or removed if negative."""
        moved = 0
        for name, position in self.position.items():
            moved += by.get(name, 0)
            self._ends[position] += moved

    def reset(self, counts: Mapping[str, int]) -> None:
        """Set the number of entries of each tensor."""
        self._ends = [0] * len(self._ends)
        self.grow(counts)
