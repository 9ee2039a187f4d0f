"""Early selection: scores of sites, the moment when the best set is stable, what is dropped, what is fixed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .settings import SearchSettings

WINDOW = 5
"""Number of sets before that the best set is compared with."""

Pair = tuple[Tensor, Tensor]


class Scores:
    """Moving average of the sensitivity of every site.

    A step's value is (s + c v) / n: s and v are the sums of |weight x gradient| on the training and on the validation
    batch, c is the mean cosine of the two products over the site's matrices, n the number of its parameters.

    Args:
        sizes: parameters of every site at the largest rank.
        decay: of the average.
    """

    def __init__(self, sizes: Tensor, *, decay: float) -> None:
        self._sizes = sizes
        self._decay = decay
        self.values = torch.zeros_like(sizes)

    def update(self, train: Sequence[Pair], validation: Sequence[Pair]) -> None:
        """Count one step in, from weight times gradient of every site on both batches."""
        new = self.values.new_tensor(
            [_sensitivity(ours, theirs) for ours, theirs in zip(train, validation, strict=True)]
        )
        self.values = self._decay * self.values + (1 - self._decay) * new / self._sizes


def _sensitivity(train: Pair, validation: Pair) -> float:
    cosines = [
        functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(train, validation, strict=True)
    ]
    cosine = torch.stack(cosines).mean()
    sums = [sum(product.abs().sum() for product in products) for products in (train, validation)]
    return float(sums[0] + cosine * sums[1])


def best_set(scores: Sequence[float], costs: Sequence[float], *, budget: float, allowed: Sequence[bool]) -> list[bool]:
    """Return the sites of highest score whose costs sum to at most `budget`; one that does not fit is passed over."""
    chosen, total = [False] * len(scores), 0.0
    for index in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if allowed[index] and total + costs[index] <= budget:
            chosen[index], total = True, total + costs[index]
    return chosen


class Stability:
    """Tells when the best set has settled.

    Args:
        threshold: smallest mean cosine with the sets before.
    """

    def __init__(self, *, threshold: float) -> None:
        self._threshold = threshold
        self._sets: list[Tensor] = []

    def is_stable(self, chosen: Sequence[bool]) -> bool:
        """Note the best set of a step, and return True if it is like the `WINDOW` sets before it."""
        now, before = torch.tensor(chosen, dtype=torch.float64), self._sets[-WINDOW:]
        self._sets = [*before, now]
        if len(before) < WINDOW:
            return False
        cosines = [functional.cosine_similarity(now, other, dim=0) for other in before]
        return float(torch.stack(cosines).mean()) >= self._threshold


def to_drop(scores: Sequence[float], costs: Sequence[float], *, amount: float, allowed: Sequence[bool]) -> list[int]:
    """Return the sites of lowest score whose costs sum to at most `amount`; at least one if `amount` is above 0."""
    dropped, total = list[int](), 0.0
    for index in sorted((i for i in range(len(scores)) if allowed[i]), key=lambda i: scores[i]):
        if amount <= 0 or (dropped and total + costs[index] > amount):
            break
        dropped.append(index)
        total += costs[index]
    return dropped


def to_fix(history: Sequence[Tensor], *, is_fixed: Tensor, rounds_left: int) -> list[int]:
    """Return the sites whose ranks have moved least since the last round, as many as the round is to fix.

    Movement is the mean standard deviation of the logits times KL(last || first) of their softmax. The number is the
    share of sites with the same likeliest rank as at the start of the interval, times the open sites, divided by the
    rounds that are left.

    Args:
        history: (sites, ranks) logits at each step of the interval.
        is_fixed: (sites), those that are fixed already.
        rounds_left: rounds with this one.
    """
    open_sites = (~is_fixed).nonzero().flatten().tolist()
    if len(history) < 2 or not open_sites:
        return open_sites if rounds_left == 1 else []
    first, last = history[0], history[-1]
    same = (first.argmax(-1) == last.argmax(-1)).double().mean().item()
    number = len(open_sites) if rounds_left == 1 else int(same * len(open_sites) / rounds_left)
    spread = torch.stack(list(history)).std(0).mean(-1)
    kl = functional.kl_div(first.log_softmax(-1), last.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    movement = (spread * kl).tolist()
    return sorted(open_sites, key=lambda index: movement[index])[:number]


def fit_budget(
    ranks: Sequence[int], scores: Sequence[float], costs: Sequence[int], settings: SearchSettings
) -> list[int]:
    """Return ranks that use the budget up without exceeding it; 0 for no adapter.

    Sites are dropped from the lowest score up until the rest fits. Then the budget that is left goes to the sites in
    the order of their scores, step by step: in each round a site moves up to its next rank if that fits. In the end no
    site could take another step.

    Args:
        ranks: what the search has found; 0 for no adapter.
        scores: of the sites.
        costs: parameters of every site at rank 1.
        settings: gives budget and possible ranks.
    """
    found, order = list(ranks), sorted(range(len(ranks)), key=lambda i: -scores[i])
    left = settings.budget - sum(rank * cost for rank, cost in zip(found, costs, strict=True))
    for index in reversed(order):
        if left < 0:
            left += found[index] * costs[index]
            found[index] = 0
    has_grown = True
    while has_grown:
        has_grown = False
        for index in order:
            higher = next((rank for rank in settings.ranks if rank > found[index]), None)
            if higher is not None and (higher - found[index]) * costs[index] <= left:
                left -= (higher - found[index]) * costs[index]
                found[index], has_grown = higher, True
    return found
