"""Streaming top-k of scores that arrive tensor by tensor: exact, without a copy of all scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 17}
"""Number of entries that are scored together; on the CPU few enough for the cache."""
CHUNK_ELSEWHERE = 1 << 26

SAMPLE = 4096
"""Number of scores from which the first threshold is estimated."""
SLACK = 64
"""Number of entries beyond 2 k that are kept before the smallest are dropped."""

INDEX_BITS = 40
"""A tensor's position and an index in it make one key: position << INDEX_BITS | index."""

Candidates = tuple[Tensor, Tensor, Tensor]
"""Scores, keys and values of entries, each of shape (m,)."""

Score = Callable[[Tensor, Tensor], Tensor]
"""Elementwise score, a function of (weights, gradients)."""


class StreamingTopK:
    r"""Keeps the `count` entries of largest score among all that were added.

    Entries are sorted by (score descending, position of the tensor, index), so the result does not depend on the order
    in which they were added. NaN scores never count.

    Entries below the `count`-th largest score so far are dropped whenever more than `2 count + SLACK` are kept, so
    memory holds little more than that and one chunk. `reference.top_entries` is the twin that sorts all scores.

    Args:
        count: number of entries to keep, >= 0.
        above: entries whose score is not above this never count. Default -inf, so that only -inf itself never does.

    Example:
        >>> top = StreamingTopK(2)
        >>> top.add(torch.tensor([0.5, 3.0]), position=0)
        >>> top.add(torch.tensor([1.0]), position=1)
        >>> positions, indices, _ = top.result()
        >>> positions.tolist(), indices.tolist()
        ([0, 1], [1, 0])
    """

    def __init__(self, count: int, *, above: float = -math.inf) -> None:
        self._count = count
        self._above = above
        self._threshold = -math.inf
        self._num_kept = 0
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, scores: Tensor, *, position: int, offset: int = 0, values: Tensor | None = None) -> None:
        """Add the entries `offset`, `offset + 1`, ... of a tensor.

        Args:
            scores: shape (n,), e.g. (131072,).
            position: of the tensor, in model order.
            offset: index in the tensor of the first score.
            values: shape (n,); returned with the entries by `result`. Default: the scores.
        """
        found = ((scores >= self._threshold) & (scores > self._above)).nonzero().view(-1)
        self._keep(scores[found], position, found + offset, (scores if values is None else values)[found])

    def scan(
        self, weight: Tensor, gradient: Tensor, *, position: int, score: Score, least: Callable[[float], float]
    ) -> None:
        """Add every entry of a tensor, with its gradient as value, but score only those that can win.

        Args:
            weight: shape (n,).
            gradient: shape (n,).
            position: of the tensor, in model order.
            score: larger is better.
            least: maps a score to the smallest |gradient| that can reach it; 0.0 if unknown.
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
                self._keep(scores, position, places, gradients)
                return
        length = chunk_length(gradient)
        for start in range(0, gradient.numel(), length):
            gradients = at_least_float(gradient[start : start + length])
            scores = score(at_least_float(weight[start : start + length]), gradients)
            self.add(scores, position=position, offset=start, values=gradients)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the kept entries in order of (position, index).

        Returns:
            Positions of tensors (int64), indices in them (int64) and values, each of shape (m,), m <= `count`.
        """
        _, keys, values = self.candidates()
        return in_order(keys, values)

    def candidates(self) -> Candidates:
        """Return the kept entries in any order: scores, keys and values, each of shape (m,)."""
        if not self._parts:
            return torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0)
        self._prune()
        scores, keys, values = self._parts[0]
        counting = (scores > self._above).nonzero().view(-1)
        return scores[counting], keys[counting], values[counting]

    def _keep(self, scores: Tensor, position: int, indices: Tensor, values: Tensor) -> None:
        if self._count and scores.numel():
            # torch.topk ranks NaN first.
            scores = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
            self._parts.append((scores, indices + (position << INDEX_BITS), values))
            self._num_kept += scores.numel()
            if self._num_kept > 2 * self._count + SLACK:
                self._prune()

    def _guess(self, weight: Tensor, gradient: Tensor, score: Score) -> float:
        """Estimate from a sample a score that about `count` entries of the tensor reach; -inf if it is too small."""
        step = max(1, gradient.numel() // SAMPLE)
        sample = score(at_least_float(weight[::step]), at_least_float(gradient[::step]))
        place = round(1.25 * self._count * sample.numel() / gradient.numel()) + 8
        if place >= sample.numel() // 2:
            return -math.inf
        return float(torch.topk(torch.nan_to_num(sample, nan=-math.inf), place).values[-1])

    def _prune(self) -> None:
        """Drop all but the `count` largest."""
        device = self._parts[0][0].device
        scores, keys, values = (torch.cat([part[column].to(device) for part in self._parts]) for column in range(3))
        if scores.numel() > self._count:
            self._threshold = float(torch.topk(scores, self._count, sorted=False).values.amin())
            is_kept = scores >= self._threshold
            num_surplus = int(is_kept.count_nonzero()) - self._count
            if num_surplus:
                # Ties go to the lower position, then to the lower index. Gradients of half precision often tie.
                ties = (scores == self._threshold).nonzero().view(-1)
                is_kept[ties[torch.topk(keys[ties], num_surplus, sorted=False).indices]] = False
            kept = is_kept.nonzero().view(-1)
            scores, keys, values = scores[kept], keys[kept], values[kept]
        self._parts = [(scores, keys, values)]
        self._num_kept = scores.numel()


def in_order(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return positions, indices and values in order of (position, index)."""
    keys, order = keys.sort()
    return keys >> INDEX_BITS, keys & ((1 << INDEX_BITS) - 1), values[order]


def _rows(count: int, numel: int) -> int:
    """Number of rows to fold a tensor into, so that about one column in forty holds one of the `count` largest."""
    even = numel & -numel
    return min(64, even, 1 << max(0, (numel // (40 * count)).bit_length() - 1))


def _reaching(gradient: Tensor, bound: float, *, rows: int) -> tuple[Tensor, Tensor] | None:
    """Find all entries with |gradient| >= bound.

    If few entries reach the bound, testing the extremes of columns first is several times faster.

    Args:
        gradient: shape (n,).
        bound: see above.
        rows: number of rows to fold the tensor into; divides n.

    Returns:
        Indices, and gradients there, each of shape (m,). None if the bound is 0 or too many columns reach it.
    """
    if not bound > 0:
        return None
    if rows < 4:
        places = (gradient.abs() >= bound).nonzero().view(-1)
        return places, at_least_float(gradient.index_select(0, places))
    folded = gradient.view(rows, -1)
    highest, lowest = folded.amax(0), folded.amin(0)
    # NaN passes through amax, and each comparison with it is False, so it hides no other entry.
    if float(torch.maximum(highest.amax(), -lowest.amin())) < bound:
        return torch.empty(0, dtype=torch.int64, device=gradient.device), at_least_float(gradient[:0])
    columns = (~((highest < bound) & (lowest > -bound))).nonzero().view(-1)
    if columns.numel() > highest.numel() // 4:
        return None
    candidates = folded.index_select(1, columns)
    row, column = places = (candidates.abs() >= bound).nonzero().unbind(1)
    return row * highest.numel() + columns[column], at_least_float(candidates[places])


def at_least_float(tensor: Tensor) -> Tensor:
    """Convert half precision to float32, in which scores are computed."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def chunk_length(tensor: Tensor) -> int:
    """Number of entries of `tensor` to score together."""
    return CHUNK.get(tensor.device.type, CHUNK_ELSEWHERE)
