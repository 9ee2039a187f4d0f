"""Runs of a suite, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradselect.app.results import Role

from .search import percent
from .suite import slug


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One training run.

    Args:
        method: its name in the suite.
        lr: learning rate.
        seed: of the run.
        role: "rate" for the search of the best learning rate by the held-out loss; "score" at the best rate, with
            evaluations.
        share: of the method's own steps; below 1 only in the search.
    """

    method: str
    lr: float
    seed: int
    role: Role
    share: float = 1.0

    @property
    def training_name(self) -> str:
        """Name of the training; both roles share it."""
        length = "" if self.share == 1 else f".share-{self.share:.12g}"
        return f"{slug(self.method)}.lr-{self.lr:.12g}.seed-{self.seed}{length}"

    @property
    def name(self) -> str:
        """Name of the run and of its result file."""
        return f"{self.training_name}.{self.role}"

    def __str__(self) -> str:
        length = "" if self.share == 1 else f", {percent(self.share)} of its steps"
        return f"{self.method}, lr {self.lr:.12g}, seed {self.seed}{length}"


def rung_runs(method: str, rates: Sequence[float], *, share: float = 1.0) -> list[PlannedRun]:
    """Return the runs of one rung of the search, with seed 0."""
    return [PlannedRun(method=method, lr=lr, seed=0, role="rate", share=share) for lr in rates]


def score_run(method: str, *, lr: float, seed: int) -> PlannedRun:
    """Return the run at the best rate."""
    return PlannedRun(method=method, lr=lr, seed=seed, role="score")


def best_rate(losses: Mapping[float, float | None]) -> float | None:
    """Return the rate with the lowest loss; of equal ones the smallest rate.

    Args:
        losses: held-out loss by rate; None for a run that failed.

    Returns:
        None if no run of the search succeeded.
    """
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(known, key=lambda rate: (known[rate], rate), default=None)


def is_at_edge(lr: float, rates: Sequence[float]) -> bool | None:
    """True if a better rate may lie outside of the grid; None for a grid of one rate."""
    return lr in (min(rates), max(rates)) if len(rates) > 1 else None


def rate_beyond(lr: float, rates: Sequence[float]) -> float:
    """Return the rate that continues a grid beyond its edge `lr`, as far from it as its neighbour inside.

    Example:
        >>> rate_beyond(0.4, [0.1, 0.2, 0.4]), rate_beyond(0.1, [0.1, 0.2, 0.4])
        (0.8, 0.05)
    """
    ordered = sorted(rates, reverse=lr == min(rates))
    # Ten digits: 0.4 * 0.4 / 0.2 is no decimal that anyone would write.
    return float(f"{lr * ordered[-1] / ordered[-2]:.10g}")
