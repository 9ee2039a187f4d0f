"""Inputs that linear layers keep for the backward pass: one copy for all layers that read the same tensor."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]
"""Ranges of columns, ascending: first, and one past the last."""


@dataclass(frozen=True)
class _Taken:
    source: weakref.ref[Tensor]
    key: tuple[Any, ...]
    parts: Sequence[weakref.ref[Tensor]]


class SharedInputs:
    """Columns of the last input, copied once.

    The projections q, k and v of a layer read one tensor. A copy for each would take more memory than a plain layer,
    which keeps a reference to the tensor. All references here are weak: the graph alone keeps a copy alive.
    """

    def __init__(self) -> None:
        self._last: _Taken | None = None

    def take(self, x: Tensor, ranges: Ranges, *, dtype: torch.dtype) -> list[Tensor]:
        """Return the columns `ranges` of `x` as matrices in `dtype`; without a copy if that is all of `x`.

        Args:
            x: input of a linear layer. Shape (..., in_features).
            ranges: of columns.
            dtype: of the product, which differs from that of `x` under autocast.
        """
        key = (x._version, ranges, dtype)
        if self._last is not None and self._last.key == key and self._last.source() is x:
            known = [part() for part in self._last.parts]
            if all(part is not None for part in known):
                return known  # pyright: ignore[reportReturnType]
        flat = x.detach().reshape(-1, x.shape[-1])
        parts = [_columns(flat, first, end).to(dtype) for first, end in ranges]
        self._last = _Taken(weakref.ref(x), key, [weakref.ref(part) for part in parts])
        return parts

    def __reduce__(self) -> Any:
        return SharedInputs, ()


def _columns(flat: Tensor, first: int, end: int) -> Tensor:
    # A view would keep the whole input alive.
    return flat if end - first == flat.shape[1] else flat[:, first:end].contiguous()
