"""Runs of a suite, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradselect.app.results import Role

from .suite import MethodEntry, slug


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One training run.

    Args:
        method: its name in the suite.
        lr: learning rate.
        seed: of the run.
        role: "rate" for the search of the best learning rate by the held-out loss; "score" at the best rate, with
            evaluations.
    """

    method: str
    lr: float
    seed: int
    role: Role

    @property
    def training_name(self) -> str:
        """Name of the training; both roles share it."""
        return f"{slug(self.method)}.lr-{self.lr:.12g}.seed-{self.seed}"

    @property
    def name(self) -> str:
        """Name of the run and of its result file."""
        return f"{self.training_name}.{self.role}"

    def __str__(self) -> str:
        return f"{self.method}, lr {self.lr:.12g}, seed {self.seed}"


def rate_runs(method: str, entry: MethodEntry) -> list[PlannedRun]:
    """Return the runs that search the grid, with seed 0; none for a grid of one rate."""
    rates = entry.rates if len(entry.rates) > 1 else ()
    return [PlannedRun(method=method, lr=lr, seed=0, role="rate") for lr in rates]


def score_run(method: str, *, lr: float, seed: int) -> PlannedRun:
    """Return the run at the best rate."""
    return PlannedRun(method=method, lr=lr, seed=seed, role="score")


def best_rate(entry: MethodEntry, losses: Mapping[float, float | None]) -> float | None:
    """Return the rate with the lowest loss; of equal ones the smallest rate.

    Args:
        entry: the grid.
        losses: held-out loss by rate; None or missing for a run that failed.

    Returns:
        None if no run of the search succeeded.
    """
    if len(entry.rates) == 1:
        return entry.rates[0]
    known = {rate: loss for rate in entry.rates if (loss := losses.get(rate)) is not None}
    return min(known, key=lambda rate: (known[rate], rate), default=None)


def is_at_edge(lr: float, rates: Sequence[float]) -> bool | None:
    """True if a better rate may lie outside of the grid; None for a grid of one rate."""
    return lr in (min(rates), max(rates)) if len(rates) > 1 else None
