"""The command `gradselect plan`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .words import HELP, METAVAR, read_words

WIDTH = 190
"""Width of the tables if there is no terminal."""


def plan(
    recipe: Annotated[str, typer.Argument(help=HELP, metavar=METAVAR)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Values that replace the recipe's or the defaults, e.g. data.max_length=512.", metavar="KEY=VALUE"
        ),
    ] = None,
    fit: Annotated[
        str | None, typer.Option(help="Propose the best setting whose peak memory fits, e.g. 12GiB.", metavar="SIZE")
    ] = None,
    fractions: Annotated[str, typer.Option(help="Fractions of AdaGradSelect, separated by commas.")] = "0.1,0.2,0.3",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables, with sizes in bytes.")] = False,
) -> None:
    """Estimate the memory and step time of training RECIPE. Reads no weights and no data."""
    from rich.console import Console

    from gradselect.app.runtime import collected_messages
    from gradselect.usage import read_fractions, read_size

    limit = None if fit is None else read_size(fit)
    shares = read_fractions(fractions)
    loaded = read_words(recipe, overrides or [], command="gradselect plan", needs_data=False, quiet_output=True)
    # Imported late because it is slow: errors in the recipe come first.
    from gradselect.app.recipe_planning import as_json as to_json
    from gradselect.app.recipe_planning import plan_recipe, show

    with collected_messages(Console(stderr=True)):
        found = plan_recipe(loaded, fractions=shares, fit=limit)
    if as_json:
        typer.echo(json.dumps(to_json(found), indent=2))
    else:
        console = Console()
        show(found, console if console.is_terminal else Console(width=WIDTH))
