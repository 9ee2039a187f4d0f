"""The commands `gradselect delta diff | apply | revert | merge`."""

from __future__ import annotations

from typing import Annotated

import typer

import gradselect as gs

app = typer.Typer(
    name="delta",
    help="Store the difference of a fine-tuned checkpoint from its base in one file.",
    no_args_is_help=True,
)

Base = Annotated[str, typer.Argument(help="Folder of the base checkpoint, in safetensors.", metavar="BASE")]
Tuned = Annotated[str, typer.Argument(help="Folder of the tuned checkpoint, in safetensors.", metavar="TUNED")]
Delta = Annotated[str, typer.Argument(help="Delta file.", metavar="DELTA")]
NewDelta = Annotated[str, typer.Argument(help="Delta file to write.", metavar="DELTA")]
NewFolder = Annotated[str, typer.Argument(help="New folder to write.", metavar="OUTPUT")]


@app.command()
def diff(
    base: Base,
    tuned: Tuned,
    path: NewDelta,
    unrelated: Annotated[
        bool,
        typer.Option("--unrelated", help="Write it even if TUNED was not trained from BASE."),
    ] = False,
) -> None:
    """Write the changes from BASE to TUNED into the new file DELTA."""
    typer.echo(gs.delta.diff(base, tuned, path, unrelated=unrelated))


@app.command()
def apply(base: Base, path: Delta, output: NewFolder) -> None:
    """Write the tuned model, bit for bit, into OUTPUT."""
    summary = gs.delta.apply(base, path, output)
    typer.echo(f"{summary}\n{output} is the tuned model, fingerprint {summary.fingerprints['tuned']}")


@app.command()
def revert(tuned: Tuned, path: Delta, output: NewFolder) -> None:
    """Write the base model, bit for bit, into OUTPUT."""
    summary = gs.delta.revert(tuned, path, output)
    typer.echo(f"{summary}\n{output} is the base model, fingerprint {summary.fingerprints['base']}")


@app.command()
def merge(
    base: Base,
    paths: Annotated[list[str], typer.Argument(help="Deltas of BASE, in order.", metavar="DELTA")],
    output: Annotated[str, typer.Argument(help="Merged delta to write.", metavar="MERGED")],
    overlap: Annotated[
        str, typer.Option(help="For entries that several deltas change: error, last, sum or mean (of the changes).")
    ] = "error",
    whole: Annotated[
        str, typer.Option(help="For changes without entries or without a sum, such as files: error or last.")
    ] = "error",
) -> None:
    """Merge several deltas of the same BASE into the new file MERGED."""
    typer.echo(gs.delta.merge(base, paths, output, overlap=overlap, whole=whole))  # type: ignore[arg-type]  # checked there
