"""Settings of a search."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from gradselect.usage import UsageError


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of an `AdapterSearch`.

    The defaults are the authors', except `begin`, which they set to one or two epochs.

    Args:
        budget: largest number of parameters of the adapter that is found.
        num_steps: steps of the search, if it is not over before.
        ranks: ranks that a layer may get, ascending. A layer may also get no adapter.
        begin: share of the steps before the first layer is dropped.
        num_prunings: steps in which layers are dropped. Fewer if `num_steps` is short: half of them.
        threshold: the set of best layers is stable if its mean cosine with the five sets before it is at least this.
        temperatures: of the Gumbel-softmax at the start and at the end.
        rate: learning rate of Adam for the logits.
        pull: weight of the penalty on logits.
        decay: of the moving averages of the scores.
        seed: seed of the draws.

    Raises:
        UsageError: a value is out of its range.

    Example:
        >>> settings = SearchSettings(budget=1000, num_steps=101)
        >>> [settings.temperature(step) for step in (0, 50, 100)]
        [5.0, 3.0, 1.0]
        >>> settings.prunings
        50
    """

    budget: int
    num_steps: int
    ranks: tuple[int, ...] = (1, 4, 8)
    begin: float = 0.1
    num_prunings: int = 100
    threshold: float = 0.85
    temperatures: tuple[float, float] = (5.0, 1.0)
    rate: float = 0.01
    pull: float = 0.01
    decay: float = 0.85
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("budget", "num_steps", "num_prunings"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("begin", "decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 0 and below 1, e.g. {name}=0.1")
        check_ranks(self.ranks)
        if min(self.temperatures) <= 0:
            raise UsageError(f"temperatures={self.temperatures} must be above 0, e.g. (5.0, 1.0)")

    def temperature(self, step: int) -> float:
        """Return the temperature of a step, counted from 0. It falls along a line."""
        first, last = self.temperatures
        return first + (last - first) * step / max(1, self.num_steps - 1)

    @property
    def first_pruning(self) -> int:
        """First step after which a layer may be dropped, counted from 0."""
        return round(self.begin * self.num_steps)

    @property
    def prunings(self) -> int:
        """Number of steps in which layers are dropped."""
        return max(1, min(self.num_prunings, self.num_steps // 2))


def check_ranks(ranks: Sequence[int]) -> None:
    """Check the ranks that a layer may get.

    Raises:
        UsageError: there is none, one is below 1, or they do not ascend.

    Example:
        >>> check_ranks((1, 4, 8))
    """
    if not ranks or ranks[0] < 1 or any(low >= high for low, high in itertools.pairwise(ranks)):
        raise UsageError(f"ranks={list(ranks)} must be positive and ascend, e.g. 1,4,8")
