"""The command `gradselect tune`."""

from __future__ import annotations

from typing import Annotated

import typer

from .resuming import advice_when_stopped


def tune(
    recipe: Annotated[str, typer.Argument(help="A YAML file; recipes/ has examples.", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values that replace the recipe's, e.g. run.evaluate_every=50.", metavar="KEY=VALUE"),
    ] = None,
    trials: Annotated[int, typer.Option(help="How many trials the study is to have in the end.")] = 20,
    search: Annotated[
        list[str] | None,
        typer.Option(
            help="What to search, e.g. optimizer.lr=1e-5:1e-3:log; may be repeated. By default the learning rate and, "
            "where the method has them, fraction and delta.",
            metavar="KEY=LOW:HIGH[:log]",
        ),
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="Folder of the trials, by default run.output and -tune; goes on where it was.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the values proposed.")] = 0,
) -> None:
    """Search for the values of RECIPE with the smallest validation loss; the result is a recipe, best.yaml."""
    from gradselect.app.recipe import load_recipe
    from gradselect.app.tune import tune as carry_out

    words = ["gradselect", "tune", recipe, *(overrides or []), "--trials", str(trials), "--seed", str(seed)]
    words += [word for text in search or [] for word in ("--search", text)] + (["--study", study] if study else [])
    with advice_when_stopped(words, interrupted="interrupted; the trials that ended are kept, go on with"):
        carry_out(load_recipe(recipe, overrides or []), study=study, num_trials=trials, search=search or (), seed=seed)
