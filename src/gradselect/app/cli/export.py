"""The command `gradselect export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradselect.usage import UsageError

from .loading import LOADING, command_stages

if TYPE_CHECKING:
    from gradselect.app.export import ExportedModel


def export(
    run: Annotated[str, typer.Argument(help="Folder of a finished run.", metavar="RUN")],
    file: Annotated[
        str | None, typer.Argument(help="With --gguf: the new file. Default: RUN.gguf.", metavar="FILE")
    ] = None,
    hub: Annotated[
        str | None, typer.Option(help="Upload to this id on the hub, with a model card.", metavar="ID")
    ] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Convert with llama.cpp's converter.")] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The adapter beside the merged model, not the model.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="With --hub: make a new repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --hub: show model card and files, and upload nothing.")
    ] = False,
    evaluation: Annotated[
        list[str] | None, typer.Option(help="With --hub: output folder of gradselect evaluate. Repeatable.")
    ] = None,
    kind: Annotated[
        str, typer.Option("--type", help="With --gguf: auto, f32, f16, bf16, q8_0, tq1_0 or tq2_0.")
    ] = "auto",
) -> None:
    """Upload the model of RUN to the hub (--hub ID), or convert it for llama.cpp (--gguf FILE)."""
    if (hub is None) == (not gguf):
        raise UsageError("give one of --hub ID and --gguf [FILE]")
    _check_options(file, gguf=gguf, of_hub={"--private": private, "--dry-run": dry_run, "--evaluation": evaluation})
    if hub is not None and kind != "auto":
        raise UsageError(f"--type {kind} is for --gguf")
    with command_stages(stderr=True).open(LOADING) as stage:
        from gradselect.app.export import export_gguf, read_exported

        model = read_exported(run, adapter=adapter)
        if hub is None:
            stage.become("converting")
            written = export_gguf(model, output=None if file is None else Path(file), kind=kind)
            typer.echo(f"{written}  {written.stat().st_size / 1e6:,.1f} MB")
            return
    _upload(model, hub, private=private, dry_run=dry_run, evaluations=evaluation or [])


def _upload(model: ExportedModel, hub: str, *, private: bool, dry_run: bool, evaluations: list[str]) -> None:
    from gradselect.app.export import export_hub, model_card, plan_upload

    found, notes = _evaluations(str(model.run), evaluations)
    upload = plan_upload(model, name=hub, card=model_card(model, name=hub, evaluations=found))
    for note in notes:
        typer.echo(f"note       {note}", err=True)
    if dry_run:
        typer.echo(upload.card)
        typer.echo("\n".join(f"{name}  {path.stat().st_size:,} bytes" for name, path in upload.files.items()))
        typer.echo(f"nothing was uploaded; without --dry-run this goes to {hub}")
        return
    typer.echo(f"uploading {len(upload.files)} files, {upload.num_bytes / 1e6:,.1f} MB, to {hub}")
    typer.echo(export_hub(upload, private=private))


def _check_options(file: str | None, *, gguf: bool, of_hub: dict[str, object]) -> None:
    if file is not None and not gguf:
        raise UsageError(f"{file!r}: a FILE is for --gguf; --hub takes the id alone")
    given = [name for name, value in of_hub.items() if value]
    if gguf and given:
        raise UsageError(f"{given[0]} is for --hub, and --gguf was given")


def _evaluations(run: str, named: list[str]) -> tuple[list[dict[str, object]], list[str]]:
    from gradselect.app.evaluate import find_evaluations

    found, notes = find_evaluations(Path(run), [Path(folder) for folder in named])
    return [dict(evaluation.values) for evaluation in found], notes
