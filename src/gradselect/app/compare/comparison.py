"""The comparison: search the learning rate of each method, then run the seeds. Finished runs are not repeated."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from gradselect import UsageError
from gradselect.app.results import Result, Rung, rungs_of
from gradselect.app.runtime import check_ids
from gradselect.usage import listed

from .calibrating import calibrated
from .folder_check import check_protocol, missing_samples
from .git_state import WatchedSource
from .protocol import protocol_settings
from .rate_search import FoundRate, find_rate
from .results import ResultsFolder
from .run_plan import RunPlan
from .runs import Runs
from .samples import check_samples
from .schedule import best_rate, is_at_edge, score_run
from .side_by_side import SideBySide
from .subprocesses import prepare
from .suite import Suite, ids_of_suite
from .summary_table import MethodSummary, show_forgetting, show_scores

Item = TypeVar("Item")
Found = TypeVar("Found")


class Comparison:
    """One call of `gradselect compare`.

    Args:
        suite: what to compare.
        folder: for the results; may hold those of earlier calls.
        seeds: number of seeds of each method.
        resume: resume unfinished runs from their newest checkpoint.
        recalibrate: measure the cost of steps again, also where an earlier call has.
        calibrate_only: end after that.
        side_by_side: places for several runs at a time. None: one after another.
        console: for progress.
        command: what the user typed.
    """

    def __init__(
        self,
        suite: Suite,
        *,
        folder: ResultsFolder,
        seeds: int,
        resume: bool,
        recalibrate: bool = False,
        calibrate_only: bool = False,
        side_by_side: SideBySide | None = None,
        console: Console,
        command: Sequence[str],
    ) -> None:
        self._suite = suite
        self._folder = folder
        self._seeds = seeds
        self._resume = resume
        self._recalibrate = recalibrate
        self._calibrate_only = calibrate_only
        self._side_by_side = side_by_side
        self._plan = RunPlan(suite)
        self._console = console
        self._command = tuple(command)
        self._protocol: dict[str, Any] = {}

    def run(self, methods: Sequence[str]) -> list[MethodSummary]:
        """Run what is not done yet, and summarize all results.

        Raises:
            UsageError: data or model are missing, or the folder holds results of another protocol.
        """
        # 1 data, base model and protocol, which all runs share
        prepare(self._suite.prepare, say=self._say)
        for note in check_ids(ids_of_suite(self._suite)):
            self._say(f"note       {note}")
        self._protocol = protocol_settings(self._suite)
        self._folder.prepare()
        check_protocol(self._folder, self._protocol, say=self._say)
        if self._suite.samples is not None:
            check_samples(self._suite.samples, self._suite.recipe)
        source = WatchedSource(self._say)
        source.look()

        # 2 under a budget, the steps of each method; nothing else runs meanwhile
        methods = self._calibrate(methods)
        if self._calibrate_only:
            self._say(f"calibrated in {self._folder.root}; no run: leave out --calibrate-only to begin")
            return []
        self._retire_others()
        self._runs = self._prepare_runs(source)
        if self._side_by_side is not None:
            self._say(f"jobs       {self._side_by_side.text}; times of steps hold for a shared machine")

        # 3 the learning rate of each method, and its first seed with the model that the search has trained
        rates = dict(zip(methods, self._each(self._search, methods), strict=True))

        # 4 the other seeds, methods in turn: stopped early, all methods have as many
        best = {method: rate.best for method, rate in rates.items() if rate.best is not None}
        seeds = range(1, self._seeds)
        self._each(
            lambda run: self._runs.ensure(run, rates=rates[run.method].grid),
            [score_run(method, lr=lr, seed=seed) for seed in seeds for method, lr in best.items()],
        )

        # 5 the table
        found = self._folder.read()[0]
        summaries = [self._summarize(method, rate, rungs=rungs_of(found, method)) for method, rate in rates.items()]
        show_scores(self._console, self._suite.name, summaries)
        if self._suite.search is not None:
            self._say(f"search     {self._suite.search.text()}")
        if any(summary.forgetting_names for summary in summaries):
            show_forgetting(self._console, summaries)
        self._say(f"results in {self._folder.root}; next: gradselect report {self._folder.root}")
        return summaries

    def _prepare_runs(self, source: WatchedSource) -> Runs:
        return Runs(
            plan=self._plan,
            folder=self._folder,
            protocol=self._protocol,
            source=source,
            resume=self._resume,
            side_by_side=self._side_by_side,
            console=self._console,
            say=self._say,
            command=self._command,
        )

    def _each(self, act: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
        """Return `act` of each item, one after another or side by side."""
        return [act(item) for item in items] if self._side_by_side is None else self._side_by_side.map(act, items)

    def _calibrate(self, methods: Sequence[str]) -> list[str]:
        """Calibrate under a budget. Return the methods that run: those that fit into its memory."""
        if self._suite.budget is None:
            if self._recalibrate or self._calibrate_only:
                option = "--recalibrate" if self._recalibrate else "--calibrate-only"
                raise UsageError(
                    f"{option}: the suite {self._suite.name!r} has no budget to calibrate for; leave it out, or write "
                    "e.g. budget.time_of=full"
                )
            return list(methods)
        calibration = calibrated(
            self._suite,
            methods,
            folder=self._folder,
            protocol=self._protocol,
            recalibrate=self._recalibrate,
            console=self._console,
            environment={} if self._side_by_side is None else self._side_by_side.alone,
        )
        self._plan = RunPlan(self._suite, calibration)
        return [name for name in methods if not calibration.methods[name].left_out]

    def _search(self, method: str) -> FoundRate:
        """Find the best rate, and run the first seed's score with it."""
        entry = self._suite.methods[method]
        if error := self._plan.error(method):
            self._say(f"failed     {method}: its calibration failed: {error}")
            return FoundRate(None, entry.rates)
        found = find_rate(
            method,
            entry,
            search=self._suite.search,
            widen=self._suite.widen,
            ensure=lambda run: self._runs.ensure(run, rates=entry.rates),
            forget=lambda losses: self._delete_losers(method, best_rate(losses), tried=losses),
            say=self._say,
        )
        if found.best is None:
            self._say(f"failed     {method}: no learning rate of {list(entry.rates)} came to an end")
            return found
        if is_at_edge(found.best, found.grid):
            self._say(
                f"note       {method}: the best rate {found.best:g} is at the edge of its grid {list(found.grid)}"
            )
        self._retire_scores(method, found.best)
        self._runs.ensure(first := score_run(method, lr=found.best, seed=0), rates=found.grid)
        if self._runs.done(first):
            if note := missing_samples(self._suite.samples, self._folder, first):
                self._say(note)
            shutil.rmtree(self._folder.training(first), ignore_errors=True)
        return found

    def _delete_losers(self, method: str, best: float | None, *, tried: Mapping[float, float | None]) -> None:
        """Delete the models of rates that are not the best. Unfinished runs stay."""
        for lr in tried:
            if lr != best and tried[lr] is not None:
                shutil.rmtree(self._folder.training(score_run(method, lr=lr, seed=0)), ignore_errors=True)

    def _retire_others(self) -> None:
        """Move results out of the way that are of other settings, or of other methods than those that fit."""
        found = [each for each in self._folder.read()[0] if each.record.method in self._suite.methods]
        for result in found:
            if reason := self._plan.why_not(result.record):
                self._retire(result, reason)
        if old := self._plan.of_an_older_calibration([result.record for result in found]):
            self._say(
                f"note       {listed(old)}: results with steps of an older calibration stay, as this call leaves these "
                "methods out; a call with them measures them and moves results with other steps aside"
            )

    def _retire_scores(self, method: str, best: float) -> None:
        """Move scores at another rate out of the way: a wider grid may have changed the best rate."""
        for result in self._folder.read()[0]:
            if (result.record.method, result.record.role) == (method, "score") and result.record.lr != best:
                self._retire(result, f"the best rate is {best:g} now")

    def _retire(self, result: Result, reason: str) -> None:
        self._say(f"note       {result.path.name}: {reason}; moved to {self._folder.retire(result)}")

    def _summarize(self, method: str, rate: FoundRate, *, rungs: tuple[Rung, ...]) -> MethodSummary:
        lr = rate.best
        runs = [] if lr is None else [score_run(method, lr=lr, seed=seed) for seed in range(self._seeds)]
        results = [result for run in runs if (result := self._runs.done(run)) is not None]
        return MethodSummary(method=method, lr=lr, rates=rate.grid, results=tuple(results), rungs=rungs)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def compare(
    suite: Suite,
    *,
    results: str | Path | None = None,
    only: Sequence[str] = (),
    seeds: int | None = None,
    resume: bool = False,
    recalibrate: bool = False,
    calibrate_only: bool = False,
    jobs: int = 1,
    per_device: int = 1,
    console: Console | None = None,
    command: Sequence[str] = (),
) -> list[MethodSummary]:
    """Run every method of a suite at its best learning rate, each run in its own process.

    The learning rate is searched with seed 0, by the loss on held-out training examples. Then each seed runs at the
    best rate and is evaluated. A failed run is reported and the comparison continues. Finished runs are not repeated.

    Args:
        suite: what to compare, e.g. from `load_suite`.
        results: folder for result files, new or of an earlier call; by default `runs/compare/<suite>`.
        only: names, slugs or globs of methods; by default all.
        seeds: number of seeds; by default that of the suite.
        resume: resume unfinished runs from their newest checkpoint instead of starting again.
        recalibrate: under a budget, measure the cost of steps again. Results with other steps are moved aside.
        calibrate_only: under a budget, measure the cost of steps, and train nothing: no summary comes back.
        jobs: runs at a time, each with its share of the threads, or an accelerator of its own. Step times then hold for
            a shared machine; a calibration is always alone.
        per_device: most runs at a time on one accelerator.
        console: for progress; by default the standard output.
        command: what the user typed, kept in the results.

    Returns:
        A summary of each method, with its successful results.

    Raises:
        UsageError: an unknown method, missing data or model, results of another protocol, or more jobs than the machine
            has threads or accelerators.

    Example:
        >>> compare(load_suite("suites/quick.yaml"), only=["full"], seeds=1)  # doctest: +SKIP
    """
    if jobs == 1 and per_device > 1:
        raise UsageError(f"--per-device={per_device} is for runs side by side; write --jobs {per_device} as well")
    methods = suite.chosen(only)
    return Comparison(
        suite,
        folder=ResultsFolder(Path(results or Path("runs", "compare", suite.name))),
        seeds=seeds or suite.seeds,
        resume=resume,
        recalibrate=recalibrate,
        calibrate_only=calibrate_only,
        side_by_side=SideBySide(jobs, device=suite.recipe.run.device, per_device=per_device) if jobs > 1 else None,
        console=console or Console(),
        command=command,
    ).run(methods)
