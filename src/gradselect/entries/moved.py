"""Entries that have moved since the last patch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from gradselect.core import is_smaller_whole

_NONE_YET = torch.empty(0, dtype=torch.int64, device="cpu")


class MovedEntries:
    """Remembers which tensors had entries that moved, and entries that moved and have left the set since.

    Entries that moved and are still in the set need no memory. Those that left are listed once somebody has asked for a
    patch; before that, and where a list would be longer than the tensor itself, the whole tensor counts as moved. So
    the lists take at most 4 / (4 + w) of the bytes of weights of w bytes: half in fp32, two thirds in bf16.
    """

    def __init__(self) -> None:
        self._touched: set[str] = set()
        self._left: dict[str, Tensor | None] = {}
        self._is_asked = False

    def touch(self, names: Iterable[str]) -> None:
        """Note that entries of these tensors have moved."""
        self._touched.update(names)

    def leave(self, name: str, weight: Tensor, leaving: Callable[[], Tensor]) -> None:
        """Note that entries leave the set.

        Args:
            name: of the tensor.
            weight: its local part.
            leaving: returns the indices of those among them that have moved, int64.
        """
        known = self._left.get(name, _NONE_YET)
        if name not in self._touched or known is None:
            return
        self._left[name] = None
        if self._is_asked:
            gone = leaving()
            listed = torch.cat([known.to(gone.device), gone]).unique()
            if not is_smaller_whole(listed.numel(), weight.numel(), weight.element_size()):
                self._left[name] = listed

    def lose_track(self) -> None:
        """Let tensors that had entries that moved count as moved whole: the set is about to be replaced."""
        self._left |= dict.fromkeys(self._touched)

    def take(self, in_set: Callable[[str], Tensor]) -> Mapping[str, Tensor | None]:
        """Return the flat indices, ascending, of entries that moved since the last call, by tensor; None: all of it.

        Args:
            in_set: returns the indices of the entries of a tensor that are in the set and have moved, int64.
        """
        found: dict[str, Tensor | None] = {}
        for name in self._touched:
            left = self._left.get(name, _NONE_YET)
            now = None if left is None else in_set(name)
            found[name] = None if left is None or now is None else torch.cat([left.to(now.device), now]).unique()
        self._touched, self._left, self._is_asked = set(), {}, True
        return found
