"""The command `gradselect data`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .loading import LOADING, command_stages
from .output import accept_any_text
from .words import HELP, METAVAR, read_words


def data(
    recipe: Annotated[str, typer.Argument(help=HELP, metavar=METAVAR)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Values that replace the recipe's or the defaults, e.g. data.max_length=512.", metavar="KEY=VALUE"
        ),
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Number of rows to show, spread over the data.")] = 3,
    row: Annotated[int | None, typer.Option(help="Show this row, whole. They are numbered from 1.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show what a training would read: rows as the model reads them, token counts, what is cut or dropped.

    Reads tokenizer and configuration of the model, but no weights.
    """
    from rich.console import Console

    stages = command_stages(stderr=True)
    with stages.open(LOADING):
        loaded = read_words(recipe, overrides or [], command="gradselect data", say=stages.say)
        # Imported late because it is slow: errors in the recipe come first.
        from gradselect.app.preview import as_json as to_json
        from gradselect.app.preview import preview_data, show
        from gradselect.app.runtime import collected_messages

    with collected_messages(stages.console):
        found = preview_data(loaded, num_examples=examples, row=row, stages=stages)
    accept_any_text()
    if as_json:
        typer.echo(json.dumps(to_json(found), indent=2))
    else:
        show(found, Console(), whole=row is not None)
