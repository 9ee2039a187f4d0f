"""The fair comparison: a suite in, one result file a run out. Importing it loads no training framework."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ._suite import Suite as Suite
from ._suite import load_suite as load_suite

if TYPE_CHECKING:
    from rich.console import Console

    from ._table import MethodSummary

__all__ = ["Suite", "compare", "load_suite"]


def compare(
    suite: Suite,
    *,
    results: str | Path | None = None,
    only: Sequence[str] = (),
    seeds: int | None = None,
    resume: bool = False,
    console: Console | None = None,
    command: Sequence[str] = (),
) -> list[MethodSummary]:
    """Run every method of a suite at its best learning rate, each run in a process of its own.

    The rate is searched with seed 0 by the loss on held-out training examples; then each seed runs at the best rate and
    is evaluated. A run that fails is reported and the rest goes on; a run that is done is not done again.

    Args:
        suite: what to compare, e.g. from `load_suite`.
        results: the folder for result files, new or of an earlier call; by default `runs/compare/<suite>`.
        only: names, slugs or globs of methods; by default all.
        seeds: how many; by default what the suite says.
        resume: go on with half-trained runs from their newest checkpoint instead of from the beginning.
        console: where progress is shown; by default the standard output.
        command: what the user typed, kept in the results.

    Returns:
        A summary of each method, with the results that succeeded.

    Raises:
        UsageError: an unknown method, data or a model that are not there, or results of another protocol.

    Example:
        >>> compare(load_suite("suites/quick.yaml"), only=["full"], seeds=1)  # doctest: +SKIP
    """
    from rich.console import Console

    from ._comparison import Comparison
    from ._results import ResultsFolder

    chosen = suite.chosen(only)
    return Comparison(
        suite,
        folder=ResultsFolder(Path(results or Path("runs", "compare", suite.name))),
        seeds=seeds or suite.seeds,
        resume=resume,
        console=console or Console(),
        command=command,
    ).run(chosen)
