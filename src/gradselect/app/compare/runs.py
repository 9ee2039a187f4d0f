"""Runs of a comparison: each in a process of its own, unless an earlier call has its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from gradselect import UsageError
from gradselect.app.progress import Stages
from gradselect.app.results import Result, write_result

from .git_state import WatchedSource
from .job import Job
from .protocol import protocol_hash
from .result_record import describe_failure
from .results import ResultsFolder, read_own_result
from .run_plan import RunPlan
from .schedule import PlannedRun, is_at_edge
from .side_by_side import SideBySide
from .subprocesses import run_job


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs of one call of `gradselect compare`.

    Args:
        plan: their recipes and budgets.
        folder: of the results, those of earlier calls too.
        protocol: settings that all runs share.
        source: of the library, looked at before each run.
        resume: resume unfinished runs from their newest checkpoint.
        side_by_side: places for several runs at a time. None: one after another.
        console: for progress.
        say: prints a line.
        command: what the user typed.
    """

    plan: RunPlan
    folder: ResultsFolder
    protocol: Mapping[str, Any]
    source: WatchedSource
    resume: bool
    side_by_side: SideBySide | None
    console: Console
    say: Callable[[str], None]
    command: tuple[str, ...]

    def ensure(self, run: PlannedRun, *, rates: Sequence[float]) -> Result:
        """Return the result of the run: of an earlier call, or a new one, which records the `rates` of its search."""
        self.source.look()
        done = self.done(run)
        return done or self._run(run, rates=rates)

    def done(self, run: PlannedRun) -> Result | None:
        """Return the result of an earlier call, if it succeeded with these settings."""
        path = self.folder.existing_result(run)
        if path is None:
            return None
        try:
            result = read_own_result(path)
        except UsageError:
            # `check_protocol` has shown the reason.
            return None
        record = result.record
        is_same = record.method == run.method and self.plan.why_not(record) is None
        # Tables omit dirty results, so a clean library repeats them.
        is_usable = self.source.state.dirty or not record.dirty
        return result if result.succeeded and is_same and is_usable else None

    def _run(self, run: PlannedRun, *, rates: Sequence[float]) -> Result:
        job, started = self._job(run, rates=rates), time.perf_counter()
        job_file, log = self.folder.job(run), self.folder.log(run)
        job_file.write_text(job.model_dump_json(indent=1), "utf-8")
        if self.side_by_side is None:
            with Stages(self.console).open(f"{run} ({run.role}), in {log}"):
                error = run_job(job_file, log)
        else:
            self.say(f"begins     {run} ({run.role}), in {log}")
            error = self.side_by_side.run_job(job_file, log)
        seconds = time.perf_counter() - started
        if error is not None:
            write_result(job.result, describe_failure(job, error=error, total_seconds=seconds))
        result = read_own_result(job.result)
        outcome = f"FAILED: {error}\n           log: {log}" if error else _figures(result)
        self.say(f"{run.role:<10} {run}  {outcome}  {seconds:.0f} s")
        return result

    def _job(self, run: PlannedRun, *, rates: Sequence[float]) -> Job:
        suite = self.plan.suite
        is_score = run.role == "score"
        is_sampled = is_score and run.seed == 0
        return Job(
            suite=suite.name,
            protocol=protocol_hash(self.protocol),
            protocol_settings=self.protocol,
            method=run.method,
            rates=tuple(rates),
            rate_at_edge=is_at_edge(run.lr, rates) if is_score else None,
            role=run.role,
            share=run.share,
            jobs=1 if self.side_by_side is None else self.side_by_side.count,
            budget=self.plan.budget(run.method),
            recipe=self.plan.recipe(run, output=self.folder.training(run)),
            evaluations=suite.evaluations if is_score else {},
            forgetting=suite.forgetting if is_score else {},
            forgetting_file=self.folder.forgetting_file,
            samples=suite.samples if is_sampled else None,
            samples_file=self.folder.samples_file(run) if is_sampled else None,
            keep_training=not is_score and run.share == 1,
            may_reuse=self.resume or self._is_trained_by_search(run),
            resume=self.resume,
            result=self.folder.result_file(run),
            commit=self.source.state.commit,
            dirty=self.source.state.dirty,
            command=self.command,
        )

    def _is_trained_by_search(self, run: PlannedRun) -> bool:
        """True if the search has trained the same, with the library at the same commit."""
        if run.role == "rate":
            return False
        search = self.done(PlannedRun(method=run.method, lr=run.lr, seed=run.seed, role="rate"))
        here = (self.source.state.commit, self.source.state.dirty)
        return search is not None and (search.record.commit, search.record.dirty) == here


def _figures(result: Result) -> str:
    """Write the losses and scores of a finished run."""
    figures = {name: score.value for name, score in result.record.scores.items()}
    if result.record.validation_loss is not None:
        figures = {"validation": result.record.validation_loss, **figures}
    return "  ".join(f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in figures.items())
