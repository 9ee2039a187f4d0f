"""Search of the learning rate of a method: the whole grid at full length, or successive halving."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gradselect.app.results import Result, Rung, reversals

from .schedule import PlannedRun, best_rate, is_at_edge, rate_beyond, rung_runs
from .search import Search, percent
from .suite import MethodEntry

Ensure = Callable[[PlannedRun], Result]
"""Returns the result of a run, of an earlier call or a new one."""


@dataclass(frozen=True)
class FoundRate:
    """Result of a search.

    Args:
        best: the rate with the lowest held-out loss; None if no run of the last rung succeeded.
        grid: rates that were tried: those of the suite, and those beyond its edge.
    """

    best: float | None
    grid: tuple[float, ...]


def find_rate(
    method: str,
    entry: MethodEntry,
    *,
    search: Search | None,
    widen: int,
    ensure: Ensure,
    forget: Callable[[Mapping[float, float | None]], None],
    say: Callable[[str], None],
) -> FoundRate:
    """Find the best rate by the held-out loss at the method's own number of steps.

    Args:
        method: name of the method.
        entry: the method and its grid.
        search: halving; None for the whole grid at full length.
        widen: rates beyond the grid, at most, that are tried at full length while the best is at its edge.
        ensure: gives the result of a run.
        forget: deletes models of full length that are not the best of these losses so far.
        say: shows a line.
    """
    if len(entry.rates) == 1:
        return FoundRate(entry.rates[0], entry.rates)
    short = [] if search is None else _short_rungs(method, entry.rates, search=search, ensure=ensure, say=say)
    losses: dict[float, float | None] = {}

    def run_whole(rates: Sequence[float]) -> None:
        for run in rung_runs(method, rates):
            losses[run.lr] = ensure(run).record.validation_loss
            forget(losses)

    run_whole(survivors(short[-1], search) if short and search else entry.rates)
    for line in disagreements(method, [*short, Rung(share=1.0, losses=losses)]):
        say(line)
    grid = entry.rates
    while len(grid) < len(entry.rates) + widen and (best := best_rate(losses)) and is_at_edge(best, grid):
        beyond = rate_beyond(best, grid)
        say(f"search     {method}: the best rate {best:g} is at the edge of its grid; next: {beyond:g}")
        grid = (*grid, beyond)
        run_whole([beyond])
    return FoundRate(best_rate(losses), grid)


def survivors(rung: Rung, search: Search) -> tuple[float, ...]:
    """Return the rates that go on from a rung, in the order of the grid; those without a loss never do."""
    best = rung.order[: search.num_kept(len(rung.losses))]
    return tuple(rate for rate in rung.losses if rate in best)


def disagreements(method: str, rungs: Sequence[Rung]) -> list[str]:
    """Return a line for each pair of rates that a short rung and the last one put in another order."""
    return [
        f"note       {method}: at {percent(pair.share)} of its steps {pair.ahead:g} was ahead of {pair.behind:g}, at "
        "all steps it is behind; so a rate that was dropped may do better than it looked"
        for pair in reversals(rungs)
    ]


def _short_rungs(
    method: str, rates: Sequence[float], *, search: Search, ensure: Ensure, say: Callable[[str], None]
) -> list[Rung]:
    """Run the rungs before the last. One that would drop no rate is left out."""
    rungs: list[Rung] = []
    for share in search.shares[:-1]:
        if search.num_kept(len(rates)) == len(rates):
            continue
        losses = {run.lr: ensure(run).record.validation_loss for run in rung_runs(method, rates, share=share)}
        rungs.append(Rung(share=share, losses=losses))
        rates = survivors(rungs[-1], search)
        figures = ", ".join(f"{rate:g} {_loss(loss)}" for rate, loss in losses.items())
        kept = ", ".join(f"{rate:g}" for rate in rates) or "none"
        say(f"search     {method}: {percent(share)} of its steps: {figures}; to the next rung: {kept}")
    return rungs


def _loss(loss: float | None) -> str:
    return "has no loss" if loss is None else f"{loss:.4f}"
