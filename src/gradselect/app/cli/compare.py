"""The command `gradselect compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from .loading import LOADING, command_stages
from .resuming import advice_when_stopped

INCOMPLETE_EXIT_CODE = 1


def compare(
    suite: Annotated[str, typer.Argument(help="Suite, a YAML file. See suites/ for examples.", metavar="SUITE")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values that replace the suite's, e.g. recipe.run.steps=100.", metavar="KEY=VALUE"),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Run this method of the suite only, by name or glob. Repeatable.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Number of runs of each method at its best learning rate.", min=1)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume unfinished runs from their checkpoints.")] = False,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="With a budget of time: measure the time of steps again.")
    ] = False,
    calibrate_only: Annotated[
        bool, typer.Option("--calibrate-only", help="With a budget of time: measure the time of steps, and end.")
    ] = False,
    jobs: Annotated[
        int, typer.Option(help="Runs at a time, each with its share of the threads or an accelerator.", min=1)
    ] = 1,
    per_device: Annotated[
        int, typer.Option(help="With --jobs: runs at a time on each accelerator, whose memory has to hold them.", min=1)
    ] = 1,
    results: Annotated[
        str | None, typer.Option(help="Folder of the result files.", show_default="runs/compare/<suite>")
    ] = None,
) -> None:
    """Run the methods of SUITE side by side, with one result file per run. Finished runs are skipped."""
    with command_stages().open(LOADING):
        from gradselect.app.compare import compare as carry_out
        from gradselect.app.compare import load_suite

        loaded = load_suite(suite, overrides or [])
    options = [word for pattern in only or [] for word in ("--only", pattern)]
    options += [] if seeds is None else ["--seeds", str(seeds)]
    options += [] if jobs == 1 else ["--jobs", str(jobs)]
    options += [] if per_device == 1 else ["--per-device", str(per_device)]
    options += [] if results is None else ["--results", results]
    options += ["--calibrate-only"] if calibrate_only else []  # what is called again after a stop must not train
    flags = [*(["--resume"] if resume else []), *(["--recalibrate"] if recalibrate else [])]
    words = ["gradselect", "compare", suite, *(overrides or []), *options]
    with advice_when_stopped([*words, "--resume"]):
        summaries = carry_out(
            loaded,
            results=results,
            only=only or (),
            seeds=seeds,
            resume=resume,
            recalibrate=recalibrate,
            calibrate_only=calibrate_only,
            jobs=jobs,
            per_device=per_device,
            command=[*words, *flags],
        )
    if any(len(summary.results) < (seeds or loaded.seeds) for summary in summaries):
        raise typer.Exit(INCOMPLETE_EXIT_CODE)
