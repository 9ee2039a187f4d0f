"""The k largest of many scores that arrive tensor by tensor: exact, and never with a copy of them all."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 17}
"""Elements that are looked at together: on the CPU few enough for the cache."""
CHUNK_ELSEWHERE = 1 << 26

SAMPLE = 4096
"""Scores from which the first threshold is guessed."""
SLACK = 64
"""Entries beyond twice the wanted number that are kept before the worst are dropped."""

Score = Callable[[Tensor, Tensor], Tensor]
"""Elementwise score of (weights, gradients)."""


class TopEntries:
    r"""Keeps the `count` entries of largest score among all that were offered.

    Entries are ordered by (score descending, rank ascending, index ascending), so the result does not depend on the
    order in which they were offered. An entry whose score is NaN never counts.

    What falls behind the `count`-th best score so far is dropped whenever `2 count + SLACK` entries have come together,
    so little more than that and one chunk are in memory; `reference.top_entries` is the twin that sorts everything.

    Args:
        count: how many entries to keep, >= 0.
        above: entries whose score is not above this never count. Default -inf: those of -inf alone do not.

    Example:
        >>> top = TopEntries(2)
        >>> top.offer(torch.tensor([0.5, 3.0]), rank=0)
        >>> top.offer(torch.tensor([1.0]), rank=1)
        >>> ranks, indices, _ = top.result()
        >>> ranks.tolist(), indices.tolist()
        ([0, 1], [1, 0])
    """

    def __init__(self, count: int, *, above: float = -math.inf) -> None:
        self._count = count
        self._above = above
        self._threshold = -math.inf
        self._num_kept = 0
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def offer(self, scores: Tensor, *, rank: int, offset: int = 0, values: Tensor | None = None) -> None:
        """Offer the entries `offset`, `offset + 1`, ... of tensor `rank`.

        Args:
            scores: shape (n,), e.g. (131072,).
            rank: number of the tensor that the scores belong to.
            offset: index in that tensor of the first score.
            values: shape (n,), what goes with the entries into `result`; default the scores.
        """
        found = ((scores >= self._threshold) & (scores > self._above)).nonzero().view(-1)
        self._add(scores[found], rank, found + offset, (scores if values is None else values)[found])

    def scan(
        self, weight: Tensor, gradient: Tensor, *, rank: int, score: Score, least: Callable[[float], float]
    ) -> None:
        """Offer every entry of a tensor, with its gradient as value, but score only those that can win.

        Args:
            weight: shape (n,).
            gradient: shape (n,).
            rank: number of the tensor.
            score: larger is better.
            least: of a score, what |gradient| an entry must reach to have it; 0.0 where that is not known.
        """
        if self._count == 0 or gradient.numel() == 0:
            return
        rows = _rows(self._count, gradient.numel())
        places = _reaching(gradient, least(self._threshold), rows=rows)
        if places is None:
            guess = self._guess(weight, gradient, score)
            places = _reaching(gradient, least(guess), rows=rows) if guess > self._threshold else None
        else:
            guess = self._threshold
        if places is not None:
            if places.numel() == 0 and guess == self._threshold:
                return
            gradients = at_least_float(gradient[places])
            scores = score(at_least_float(weight[places]), gradients)
            found = ((scores >= guess) & (scores > self._above)).nonzero().view(-1)
            if guess == self._threshold or found.numel() >= self._count:
                self._threshold = guess
                self._add(scores[found], rank, places[found], gradients[found])
                return
        length = chunk_length(gradient)
        for start in range(0, gradient.numel(), length):
            gradients = at_least_float(gradient[start : start + length])
            scores = score(at_least_float(weight[start : start + length]), gradients)
            self.offer(scores, rank=rank, offset=start, values=gradients)

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

    def _add(self, scores: Tensor, rank: int, indices: Tensor, values: Tensor) -> None:
        if self._count and scores.numel():
            ranks = torch.full_like(indices, rank, dtype=torch.int32)
            self._parts.append((scores, ranks, indices, values))
            self._num_kept += scores.numel()
            if self._num_kept > 2 * self._count + SLACK:
                self._prune()

    def _guess(self, weight: Tensor, gradient: Tensor, score: Score) -> float:
        """What about `count` entries of this tensor reach, from a sample; -inf if it is too small to say."""
        step = max(1, gradient.numel() // SAMPLE)
        sample = score(at_least_float(weight[::step]), at_least_float(gradient[::step]))
        position = round(1.25 * self._count * sample.numel() / gradient.numel()) + 8
        if position >= sample.numel() // 2:
            return -math.inf
        return float(torch.topk(torch.nan_to_num(sample, nan=-math.inf), position).values[-1])

    def _prune(self) -> None:
        """Only the `count` best stay."""
        device = self._parts[0][0].device
        scores, ranks, indices, values = (
            torch.cat([part[column].to(device) for part in self._parts]) for column in range(4)
        )
        if scores.numel() > self._count:
            best, kept = torch.topk(scores, self._count, sorted=True)
            self._threshold = float(best[-1])
            ties = (scores == best[-1]).nonzero().view(-1)
            if ties.numel() > 1:
                # Of equal scores those of lower rank, then of lower index.
                above = (scores > best[-1]).nonzero().view(-1)
                ties = ties[_order(ranks[ties], indices[ties])][: self._count - above.numel()]
                kept = torch.cat([above, ties])
            scores, ranks, indices, values = scores[kept], ranks[kept], indices[kept], values[kept]
        self._parts = [(scores, ranks, indices, values)]
        self._num_kept = scores.numel()


def _order(ranks: Tensor, indices: Tensor) -> Tensor:
    """The permutation that sorts by (rank, index)."""
    by_index = torch.argsort(indices, stable=True)
    return by_index[torch.argsort(ranks[by_index], stable=True)]


def _rows(count: int, numel: int) -> int:
    """Into how many rows to fold a tensor so that about one column in forty holds one of its `count` best entries."""
    even = numel & -numel
    return min(64, even, 1 << max(0, (numel // (40 * count)).bit_length() - 1))


def _reaching(gradient: Tensor, bound: float, *, rows: int) -> Tensor | None:
    """Positions of all entries with |gradient| >= bound, ascending; None where the bound says little. Shape (m,).

    Where few entries do it is several times faster to look at the extremes of columns first.

    Args:
        rows: into how many to fold the tensor, whose number of entries it divides.
    """
    if not bound > 0:
        return None
    if rows < 4:
        return (gradient.abs() >= bound).nonzero().view(-1)
    folded = gradient.view(rows, -1)
    highest, lowest = folded.amax(0), folded.amin(0)
    # A NaN comes through, and what is asked of it here is never true: it hides no other entry.
    if float(torch.maximum(highest.amax(), -lowest.amin())) < bound:
        return torch.empty(0, dtype=torch.int64, device=gradient.device)
    columns = (~((highest < bound) & (lowest > -bound))).nonzero().view(-1)
    if columns.numel() > highest.numel() // 4:
        return None
    row, column = (folded.index_select(1, columns).abs() >= bound).nonzero().unbind(1)
    return row * highest.numel() + columns[column]


def at_least_float(tensor: Tensor) -> Tensor:
    """Scores of half-precision tensors are computed in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def chunk_length(tensor: Tensor) -> int:
    """Elements of `tensor` to look at together."""
    return CHUNK.get(tensor.device.type, CHUNK_ELSEWHERE)
