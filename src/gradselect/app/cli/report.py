"""The command `gradselect report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradselect.usage import UsageError

from .loading import LOADING, command_stages

if TYPE_CHECKING:
    from gradselect.app.report import ReportSummary


def report(
    results: Annotated[
        str,
        typer.Argument(
            help="Folder of one training run, finished or not, or folder with the results of one suite.",
            metavar="FOLDER",
        ),
    ],
    output: Annotated[
        str | None, typer.Option(help="Folder for report.html and its pictures. Default: FOLDER/report.")
    ] = None,
    records: Annotated[
        str | None, typer.Option(help="For a run: file of the selection records, if it is elsewhere.")
    ] = None,
    evaluation: Annotated[
        list[str] | None, typer.Option(help="For a run: output folder of gradselect evaluate. Repeatable.")
    ] = None,
    include_dirty: Annotated[
        bool,
        typer.Option("--include-dirty", help="For a suite: include runs from a tree with uncommitted changes."),
    ] = False,
) -> None:
    """Write one HTML page about a training run or a comparison: what was run, tables and pictures."""
    with command_stages(stderr=True).open(LOADING) as stage:
        from gradselect.app.report import ReportSummary, is_run, write_report, write_run_report

        stage.become("reading and drawing")
        if records is not None or evaluation or is_run(Path(results)):
            if include_dirty:
                raise UsageError(f"--include-dirty is for the results of a suite, and {results} is a training run")
            _check_exists(results)
            shown = write_run_report(results, output=output, records=records, evaluations=evaluation or ())
        else:
            shown = write_report(results, output=output, include_dirty=include_dirty)
    if isinstance(shown, ReportSummary):
        _show_comparison(shown)
        return
    for line in (*shown.lines, f"page       {shown.page}  pictures {len(shown.pictures)}"):
        typer.echo(line)


def _show_comparison(summary: ReportSummary) -> None:
    for skipped in summary.skipped:
        typer.echo(f"skipped {skipped.file}: {skipped.reason}", err=True)
    if summary.num_dirty:
        typer.echo(f"left out, from a tree with uncommitted changes (--include-dirty): {summary.num_dirty}", err=True)
    if summary.num_failed:
        typer.echo(f"failed, listed on the page: {summary.num_failed}", err=True)
    typer.echo(f"{summary.page}  runs {summary.num_runs}, pictures {len(summary.pictures)}")


def _check_exists(path: str) -> None:
    if not Path(path).exists():
        raise UsageError(f"{path}: no such folder")
