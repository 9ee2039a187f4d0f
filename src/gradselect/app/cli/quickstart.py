"""The command `gradselect quickstart`."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer
from rich.console import Console

from .loading import LOADING, command_stages
from .resuming import INTERRUPTED_EXIT_CODE


def quickstart(
    output: Annotated[
        str, typer.Argument(help="New folder for data, model and picture.", metavar="[OUTPUT]")
    ] = "gradselect-quickstart",
    steps: Annotated[int | None, typer.Option(help="Number of optimizer steps. Default: 500.", min=1)] = None,
) -> None:
    """Train the small model of the package on word problems and test it: offline, on a CPU, in minutes."""
    with command_stages().open(LOADING):
        from gradselect.app.quickstart import quickstart as carry_out

    try:
        carry_out(output, steps=steps, console=Console())
    except KeyboardInterrupt:
        again = shlex.join(["gradselect", "quickstart", f"{output}-2"])
        typer.echo(f"interrupted; what was made stays in {output}; to begin again: {again}", err=True)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
