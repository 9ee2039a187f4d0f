"""The command `gradselect tune`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from gradselect.usage import UsageError, read_size

from .loading import LOADING, command_stages
from .resuming import advice_when_stopped
from .words import HELP, METAVAR, read_words

OF_VALUES = ("--trials", "--search", "--sampler", "--fit")
OF_ADAPTERS = ("--budget", "--ranks")


def tune(
    recipe: Annotated[str, typer.Argument(help=HELP, metavar=METAVAR)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Values that replace the recipe's or the defaults, e.g. run.evaluate_every=50.", metavar="KEY=VALUE"
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Total number of trials of the study.", show_default="20")] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            help="Range to search, e.g. optimizer.lr=1e-5:1e-3:log. Repeatable. Default: the learning rate and, if the "
            "method has them, fraction and delta.",
            metavar="KEY=LOW:HIGH[:log]",
        ),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="What proposes values: tpe or cmaes.", show_default="tpe")] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            help="Start no trial whose planned peak is larger, e.g. 12GiB. Default: the memory of the device.",
            metavar="SIZE",
        ),
    ] = None,
    space: Annotated[
        str,
        typer.Option(help="What is searched: values of the recipe, or adapters: the layers of a LoRA and their ranks."),
    ] = "values",
    budget: Annotated[
        int | None,
        typer.Option(help="With --space adapters: most parameters. Default: as the recipe's rank takes on all layers."),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(help="With --space adapters: ranks that a layer may get.", show_default="1,4,8"),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(help="Folder of the trials; an existing study continues. Default: run.output with -tune."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the proposed values.")] = 0,
) -> None:
    """Search the learning rate, or other values, for the smallest validation loss. The result is a recipe, best.yaml.

    Several processes can share a study: start the same command again.
    """
    given = {
        "--trials": trials,
        "--search": search,
        "--sampler": sampler,
        "--fit": fit,
        "--budget": budget,
        "--ranks": ranks,
        "--study": study,
    }
    _check_options(space, given)
    with advice_when_stopped(
        _words(recipe, overrides or [], given, space=space, seed=seed), interrupted=_interrupted(space)
    ):
        options = _options(space, given)
        stages = command_stages()
        with stages.open(LOADING):
            loaded = read_words(recipe, overrides or [], command="gradselect tune", say=stages.say)
            # Imported late because it is slow: errors in the recipe come first.
            from gradselect.app.tune import tune as carry_out
            from gradselect.app.tune import tune_adapters

        if space == "adapters":
            tune_adapters(loaded, study=study, seed=seed, **options)
        else:
            carry_out(loaded, study=study, seed=seed, **options)


def _check_options(space: str, given: Mapping[str, Any]) -> None:
    if space not in ("values", "adapters"):
        raise UsageError(f"--space {space!r}: there is no such space; write values or adapters")
    others = OF_VALUES if space == "adapters" else OF_ADAPTERS
    wrong = [name for name in others if given[name] is not None]
    if wrong:
        other = "values" if space == "adapters" else "adapters"
        raise UsageError(f"{wrong[0]} belongs to --space {other}; leave it out, or write --space {other}")


def _options(space: str, given: Mapping[str, Any]) -> dict[str, Any]:
    if space == "adapters":
        return {
            "budget": given["--budget"],
            **({} if given["--ranks"] is None else {"ranks": _ranks(given["--ranks"])}),
        }
    return {
        "num_trials": 20 if given["--trials"] is None else given["--trials"],
        "search": given["--search"] or (),
        "sampler": given["--sampler"] or "tpe",
        "fit": None if given["--fit"] is None else read_size(given["--fit"]),
    }


def _ranks(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UsageError(f"--ranks {text!r}: write ranks with commas between them, e.g. --ranks 1,4,8")
    return tuple(map(int, words))


def _words(recipe: str, overrides: list[str], given: Mapping[str, Any], *, space: str, seed: int) -> list[str]:
    """Return the command that continues the search."""
    words = ["gradselect", "tune", recipe, *overrides]
    if space == "adapters":
        words += ["--space", space]
    elif given["--trials"] is None:
        words += ["--trials", "20"]
    for name, value in given.items():
        for each in value if isinstance(value, list) else [value]:
            words += [] if each is None else [name, str(each)]
    return [*words, "--seed", str(seed)]


def _interrupted(space: str) -> str:
    if space == "adapters":
        return "interrupted; nothing is kept, start again with"
    return "interrupted; finished trials are kept, resume with"
