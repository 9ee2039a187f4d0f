"""The command `gradselect train`."""

from __future__ import annotations

from typing import Annotated

import typer

from .loading import LOADING, command_stages
from .resuming import advice_when_stopped
from .words import HELP, METAVAR, read_words


def train(
    recipe: Annotated[str, typer.Argument(help=HELP, metavar=METAVAR)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Values that replace the recipe's or the defaults, e.g. optimizer.lr=1e-4.", metavar="KEY=VALUE"
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume from the newest complete checkpoint in run.output; without one, start."),
    ] = False,
) -> None:
    """Train by RECIPE, or train MODEL on DATA. The result is a plain Hugging Face checkpoint in run.output."""
    words = ["gradselect", "train", recipe, *(overrides or [])]
    advice = "interrupted; resume from the newest checkpoint with"
    with advice_when_stopped([*words, "--resume"], interrupted=advice):
        stages = command_stages()
        with stages.open(LOADING):
            loaded = read_words(recipe, overrides or [], command="gradselect train", say=stages.say)
            # Imported late because it is slow: errors in the recipe come first.
            from gradselect.app.runtime import own_process_group
            from gradselect.app.train import train as carry_out

        with own_process_group():
            carry_out(loaded, resume=resume, command=[*words, *(["--resume"] if resume else [])])
