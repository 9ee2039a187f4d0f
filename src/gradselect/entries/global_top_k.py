"""Global top-k over tensors and shards."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from .shards import Shards
from .top_k import Candidates, StreamingTopK, in_order

Winners = Mapping[str, tuple[Tensor, Tensor]]
"""By tensor name: flat indices in the local part (int64, ascending), and values there."""


class GlobalTopK:
    """Keeps the entries of largest score while tensors are scanned one after the other.

    Ties go to the earlier tensor, then to the lower index in it. See `StreamingTopK`.

    Args:
        names: of all tensors, in model order.
        shards: locate their entries.
        counts: k: an int for one top-k over all tensors, a mapping by tensor name for one in each.
        above: entries whose score is not above this never count.
    """

    def __init__(
        self, names: tuple[str, ...], shards: Shards, counts: int | Mapping[str, int], *, above: float = -math.inf
    ) -> None:
        self._names = names
        self._shards = shards
        self._counts: dict[str | None, int] = {None: counts} if isinstance(counts, int) else {**counts}
        self._above = above
        self._tops: dict[str | None, StreamingTopK] = {}
        self._scanned: set[str] = set()

    def top(self, name: str) -> StreamingTopK:
        """Return the top-k of this tensor's entries."""
        self._scanned.add(name)
        key = self._key(name)
        if key not in self._tops:
            self._tops[key] = self._empty(key)
        return self._tops[key]

    def result(self) -> Winners:
        """Return the winners that this rank holds, by scanned tensor, or by every tensor if one k counts over all."""
        won: dict[str, tuple[Tensor, Tensor]] = {}
        for key, (_, keys, values) in self._winners().items():
            positions, indices, values = in_order(keys, values)
            present, sizes = positions.unique_consecutive(return_counts=True)
            parts = zip(present.tolist(), indices.split(sizes.tolist()), values.split(sizes.tolist()), strict=True)
            found = {self._names[position]: (part, its_values) for position, part, its_values in parts}
            nothing = (indices[:0], values[:0])
            won.update({name: found.get(name, nothing) for name in (self._names if key is None else [key])})
        return won

    def _winners(self) -> dict[str | None, Candidates]:
        if not self._shards.is_split:
            return {key: top.candidates() for key, top in self._tops.items()}
        scanned = self._shards.total({name: name in self._scanned for name in self._names})
        # Every rank takes part in every top-k; otherwise the others would wait.
        keys = list(dict.fromkeys(self._key(name) for name in self._names if scanned[name]))
        candidates = [self._tops.get(key, self._empty(key)).candidates() for key in keys]
        winners = self._shards.global_top_k(candidates, [self._counts.get(key, 0) for key in keys]) if keys else []
        return dict(zip(keys, winners, strict=True))

    def _key(self, name: str) -> str | None:
        return None if None in self._counts else name

    def _empty(self, key: str | None) -> StreamingTopK:
        return StreamingTopK(self._counts.get(key, 0), above=self._above)
