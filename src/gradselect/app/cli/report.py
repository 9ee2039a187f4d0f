"""The command `gradselect report`."""

from __future__ import annotations

from typing import Annotated

import typer


def report(
    results: Annotated[str, typer.Argument(help="Folder with the results of one suite.", metavar="RESULTS")],
    output: Annotated[
        str | None, typer.Option(help="Folder for report.html and its pictures. Default: RESULTS/report.")
    ] = None,
    include_dirty: Annotated[
        bool, typer.Option("--include-dirty", help="Include runs from a tree with uncommitted changes.")
    ] = False,
) -> None:
    """Write one HTML page about RESULTS: tables with intervals and tests, pictures, versions and commands."""
    from gradselect.app.report import write_report

    summary = write_report(results, output=output, include_dirty=include_dirty)
    for skipped in summary.skipped:
        typer.echo(f"skipped {skipped.file}: {skipped.reason}", err=True)
    if summary.num_dirty:
        typer.echo(f"left out, from a tree with uncommitted changes (--include-dirty): {summary.num_dirty}", err=True)
    if summary.num_failed:
        typer.echo(f"failed, listed on the page: {summary.num_failed}", err=True)
    typer.echo(f"{summary.page}  runs {summary.num_runs}, pictures {len(summary.pictures)}")
