"""The k largest of many scores that arrive tensor by tensor: exact, and never with a copy of them all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 18}
"""Elements that are looked at together: on the CPU few enough for the cache."""
CHUNK_ELSEWHERE = 1 << 26


class TopEntries:
    r"""Keeps the `count` entries of largest score among all that were offered.

    Entries are ordered by (score descending, rank ascending, index ascending), so the result does not depend on the
    order in which they were offered. An entry whose score is NaN never counts.

    After each chunk only entries that reach the `count`-th best score so far are kept, so about `count` entries and one
    chunk are in memory; `reference.top_entries` is the twin that sorts everything.

    Args:
        count: how many entries to keep, >= 0.

    Example:
        >>> top = TopEntries(2)
        >>> top.offer(torch.tensor([0.5, 3.0]), rank=0)
        >>> top.offer(torch.tensor([1.0]), rank=1)
        >>> ranks, indices, _ = top.result()
        >>> ranks.tolist(), indices.tolist()
        ([0, 1], [1, 0])
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._threshold = -math.inf
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def offer(self, scores: Tensor, *, rank: int, offset: int = 0, values: Tensor | None = None) -> None:
        """Offer the entries `offset`, `offset + 1`, ... of tensor `rank`.

        Args:
            scores: shape (n,), e.g. (262144,).
            rank: number of the tensor that the scores belong to.
            offset: index in that tensor of the first score.
            values: shape (n,), what goes with the entries into `result`; default the scores.
        """
        if self._count == 0:
            return
        if self._threshold == -math.inf and scores.numel() > 2 * self._count:
            # Without a threshold everything would be a candidate: begin with that of these scores alone.
            best = torch.topk(torch.nan_to_num(scores, nan=-math.inf), self._count, sorted=True).values
            self._threshold = float(best[-1])
        found = (scores >= self._threshold).nonzero().view(-1)
        if found.numel() == 0:
            return
        ranks = torch.full_like(found, rank, dtype=torch.int32)
        self._parts.append((scores[found], ranks, found + offset, (scores if values is None else values)[found]))
        if sum(part[0].numel() for part in self._parts) > 2 * self._count + 4096:
            self._prune()

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The kept entries in order of (rank, index).

        Returns:
            ranks (int32), indices in their tensors (int64) and values, each of shape (m,), m <= `count`.
        """
        if not self._parts:
            return torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64), torch.empty(0)
        self._prune()
        _, ranks, indices, values = self._parts[0]
        order = _order(ranks, indices)
        return ranks[order], indices[order], values[order]

    def _prune(self) -> None:
        """Only the `count` best stay."""
        device = self._parts[0][0].device
        scores, ranks, indices, values = (
            torch.cat([part[column].to(device) for part in self._parts]) for column in range(4)
        )
        if scores.numel() > self._count:
            threshold = torch.topk(scores, self._count, sorted=True).values[-1]
            self._threshold = float(threshold)
            kept = (scores > threshold).nonzero().view(-1)
            ties = (scores == threshold).nonzero().view(-1)
            # Of equal scores those of lower rank, then of lower index.
            ties = ties[_order(ranks[ties], indices[ties])][: self._count - kept.numel()]
            kept = torch.cat([kept, ties])
            scores, ranks, indices, values = scores[kept], ranks[kept], indices[kept], values[kept]
        self._parts = [(scores, ranks, indices, values)]


def _order(ranks: Tensor, indices: Tensor) -> Tensor:
    """The permutation that sorts by (rank, index)."""
    by_index = torch.argsort(indices, stable=True)
    return by_index[torch.argsort(ranks[by_index], stable=True)]


def chunk_length(tensor: Tensor) -> int:
    """Elements of `tensor` to look at together."""
    return CHUNK.get(tensor.device.type, CHUNK_ELSEWHERE)
