"""The command `gradselect plan`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .loading import LOADING, command_stages
from .words import HELP, METAVAR, read_words

WIDTH = 10_000
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
    in_full: Annotated[
        bool,
        typer.Option("--all", help="Also masks, every category of bytes, and what the recipe's levers would save."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables, with sizes in bytes.")] = False,
) -> None:
    """Estimate memory and step time before training, for AdaGradSelect, full fine-tuning and LoRA. Reads no weights."""
    from rich.console import Console

    from gradselect.app.runtime import collected_messages, device_memory
    from gradselect.usage import read_fractions, read_size

    limit = None if fit is None else read_size(fit)
    shares = read_fractions(fractions)
    stages = command_stages(stderr=True)
    with stages.open(LOADING):
        loaded = read_words(recipe, overrides or [], command="gradselect plan", say=stages.say, needs_data=False)
        # Imported late because it is slow: errors in the recipe come first.
        from gradselect.app.recipe_planning import as_json as to_json
        from gradselect.app.recipe_planning import plan_recipe, show

    with collected_messages(stages.console), stages.open("planning"):
        found = plan_recipe(loaded, fractions=shares, fit=limit, in_full=in_full or as_json)
    if as_json:
        typer.echo(json.dumps(to_json(found), indent=2))
        return
    console = Console()
    show(
        found,
        console if console.is_terminal else Console(width=WIDTH),
        memory=device_memory(loaded.run.device),
        in_full=in_full,
    )
