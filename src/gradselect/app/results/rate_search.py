"""Search of a learning rate, read from its result files: the losses of each rung, and where rungs disagree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from .result_file import Result


@dataclass(frozen=True, kw_only=True)
class Rung:
    """Runs of the search that have one length.

    Args:
        share: of the method's own steps; 1 for the last rung, which chooses.
        losses: held-out loss at the end, by rate; None for a run that failed or has no finite loss.

    Example:
        >>> Rung(share=0.25, losses={1e-3: 2.2, 3e-3: 2.1, 1e-2: None}).order
        (0.003, 0.001)
    """

    share: float
    losses: Mapping[float, float | None]

    @property
    def order(self) -> tuple[float, ...]:
        """Rates that have a loss, the best first; of equal ones the smaller rate first."""
        known = {rate: loss for rate, loss in self.losses.items() if loss is not None and math.isfinite(loss)}
        return tuple(sorted(known, key=lambda rate: (known[rate], rate)))


@dataclass(frozen=True, kw_only=True)
class Reversal:
    """Two rates that a short rung and the last one put in another order.

    Args:
        share: of the short rung.
        ahead: rate that was ahead there, and is behind in the last rung.
        behind: rate that was behind there.
    """

    share: float
    ahead: float
    behind: float


def rungs_of(results: Iterable[Result], method: str) -> tuple[Rung, ...]:
    """Return the search of a method, the shortest rung first; one rung for a whole grid, none without a search.

    Example:
        >>> rungs_of([], "full")
        ()
    """
    losses: dict[float, dict[float, float | None]] = {}
    for result in results:
        record = result.record
        if (record.method, record.role) == (method, "rate"):
            loss = record.validation_loss if result.succeeded else None
            losses.setdefault(float(record.share), {})[record.lr] = loss
    return tuple(Rung(share=share, losses=dict(sorted(losses[share].items()))) for share in sorted(losses))


def reversals(rungs: Sequence[Rung]) -> tuple[Reversal, ...]:
    """Return the pairs of rates of the last rung that an earlier one had in another order.

    Example:
        >>> reversals([Rung(share=0.5, losses={1.0: 2.0, 2.0: 3.0}), Rung(share=1.0, losses={1.0: 2.0, 2.0: 1.0})])
        (Reversal(share=0.5, ahead=1.0, behind=2.0),)
    """
    last = rungs[-1].order if rungs else ()
    return tuple(
        Reversal(share=rung.share, ahead=worse, behind=better)
        for rung in rungs[:-1]
        for better, worse in combinations(last, 2)
        if {better, worse} <= set(rung.order) and rung.order.index(worse) < rung.order.index(better)
    )
