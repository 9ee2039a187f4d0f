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

INDEX_BITS = 40
"""A tensor's number and an index in it make one key: rank << INDEX_BITS | index."""

Best = tuple[Tensor, Tensor, Tensor]
"""Scores, keys and values of entries, each of shape (m,)."""

Score = Callable[[Tensor, Tensor], Tensor]
"""Elementwise score of (weights, gradients)."""


class StreamingTopK:
    r"""Keeps the `count` entries of largest score among all that were offered.

    Entries are ordered by (score descending, rank ascending, index ascending), so the result does not depend on the
    order in which they were offered. An entry whose score is NaN never counts.

    What falls behind the `count`-th best score so far is dropped whenever `2 count + SLACK` entries have come together,
    so little more than that and one chunk are in memory; `reference.top_entries` is the twin that sorts everything.

    Args:
        count: how many entries to keep, >= 0.
        above: entries whose score is not above this never count. Default -inf: those of -inf alone do not.

    Example:
        >>> top = StreamingTopK(2)
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
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

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
        bound = self._threshold
        found = _reaching(gradient, least(bound), rows=rows)
        if found is None:
            bound = self._guess(weight, gradient, score)
            found = _reaching(gradient, least(bound), rows=rows) if bound > self._threshold else None
        if found is not None:
            places, gradients = found
            if places.numel() == 0 and bound == self._threshold:
                return
            scores = score(at_least_float(weight.index_select(0, places)), gradients)
            if bound == self._threshold or int((scores >= bound).count_nonzero()) >= self._count:
                self._threshold = bound
                self._add(scores, rank, places, gradients)
                return
        length = chunk_length(gradient)
        for start in range(0, gradient.numel(), length):
            gradients = at_least_float(gradient[start : start + length])
            scores = score(at_least_float(weight[start : start + length]), gradients)
            self.offer(scores, rank=rank, offset=start, values=gradients)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The kept entries in order of (rank, index).

        Returns:
            ranks (int64), indices in their tensors (int64) and values, each of shape (m,), m <= `count`.
        """
        _, keys, values = self.best()
        return in_order(keys, values)

    def best(self) -> Best:
        """The kept entries in any order: scores, keys and values, each of shape (m,)."""
        if not self._parts:
            return torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0)
        self._prune()
        scores, keys, values = self._parts[0]
        counting = (scores > self._above).nonzero().view(-1)
        return scores[counting], keys[counting], values[counting]

    def _add(self, scores: Tensor, rank: int, indices: Tensor, values: Tensor) -> None:
        if self._count and scores.numel():
            # The best of all that are there is found below, and a NaN would be it.
            scores = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
            self._parts.append((scores, indices + (rank << INDEX_BITS), values))
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
        scores, keys, values = (torch.cat([part[column].to(device) for part in self._parts]) for column in range(3))
        if scores.numel() > self._count:
            best, order = torch.topk(scores, self._count + 1)
            self._threshold, next_best = best[-2:].tolist()
            if self._threshold == next_best:
                # Of equal scores those of lower rank, then of lower index.
                by_key = keys.argsort()
                order = by_key[scores[by_key].argsort(descending=True, stable=True)]
            order = order[: self._count]
            scores, keys, values = scores[order], keys[order], values[order]
        self._parts = [(scores, keys, values)]
        self._num_kept = scores.numel()


def in_order(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks, indices and values in order of (rank, index)."""
    keys, order = keys.sort()
    return keys >> INDEX_BITS, keys & ((1 << INDEX_BITS) - 1), values[order]


def _rows(count: int, numel: int) -> int:
    """Into how many rows to fold a tensor so that about one column in forty holds one of its `count` best entries."""
    even = numel & -numel
    return min(64, even, 1 << max(0, (numel // (40 * count)).bit_length() - 1))


def _reaching(gradient: Tensor, bound: float, *, rows: int) -> tuple[Tensor, Tensor] | None:
    """All entries with |gradient| >= bound: their positions, and the gradients there, each of shape (m,).

    Where few entries do it is several times faster to look at the extremes of columns first.

    Args:
        rows: into how many to fold the tensor, whose number of entries it divides.

    Returns:
        None where the bound says little.
    """
    if not bound > 0:
        return None
    if rows < 4:
        places = (gradient.abs() >= bound).nonzero().view(-1)
        return places, at_least_float(gradient.index_select(0, places))
    folded = gradient.view(rows, -1)
    highest, lowest = folded.amax(0), folded.amin(0)
    # A NaN comes through, and what is asked of it here is never true: it hides no other entry.
    if float(torch.maximum(highest.amax(), -lowest.amin())) < bound:
        return torch.empty(0, dtype=torch.int64, device=gradient.device), at_least_float(gradient[:0])
    columns = (~((highest < bound) & (lowest > -bound))).nonzero().view(-1)
    if columns.numel() > highest.numel() // 4:
        return None
    candidates = folded.index_select(1, columns)
    row, column = places = (candidates.abs() >= bound).nonzero().unbind(1)
    return row * highest.numel() + columns[column], at_least_float(candidates[places])


def at_least_float(tensor: Tensor) -> Tensor:
    """Scores of half-precision tensors are computed in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def chunk_length(tensor: Tensor) -> int:
    """Elements of `tensor` to look at together."""
    return CHUNK.get(tensor.device.type, CHUNK_ELSEWHERE)
