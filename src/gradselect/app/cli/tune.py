"""The command `gradselect tune`."""

from __future__ import annotations

from typing import Annotated

import typer

from .loading import LOADING, command_stages
from .resuming import advice_when_stopped
from .words import HELP, METAVAR, read_words


def tune(
    recipe: Annotated[str, typer.Argument(help=HELP, metavar=METAVAR)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Values that replace the recipe's or the defaults, e.g. run.evaluate_every=50.", metavar="KEY=VALUE"
        ),
    ] = None,
    trials: Annotated[int, typer.Option(help="Total number of trials of the study.")] = 20,
    search: Annotated[
        list[str] | None,
        typer.Option(
            help="Range to search, e.g. optimizer.lr=1e-5:1e-3:log. Repeatable. Default: the learning rate and, if the "
            "method has them, fraction and delta.",
            metavar="KEY=LOW:HIGH[:log]",
        ),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(help="Folder of the trials; an existing study continues. Default: run.output with -tune."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the proposed values.")] = 0,
) -> None:
    """Search the values of a recipe with the smallest validation loss. The result is a recipe, best.yaml."""
    words = ["gradselect", "tune", recipe, *(overrides or []), "--trials", str(trials), "--seed", str(seed)]
    words += [word for text in search or [] for word in ("--search", text)] + (["--study", study] if study else [])
    with advice_when_stopped(words, interrupted="interrupted; finished trials are kept, resume with"):
        stages = command_stages()
        with stages.open(LOADING):
            loaded = read_words(recipe, overrides or [], command="gradselect tune", say=stages.say)
            # Imported late because it is slow: errors in the recipe come first.
            from gradselect.app.tune import tune as carry_out

        carry_out(loaded, study=study, num_trials=trials, search=search or (), seed=seed)
