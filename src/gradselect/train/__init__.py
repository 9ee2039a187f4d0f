"""The application: a recipe in, a plain Hugging Face checkpoint out. Importing it loads no training framework."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ._load import dump_recipe as dump_recipe
from ._load import load_recipe as load_recipe
from ._messages import collected_messages
from ._recipe import Recipe as Recipe
from ._signals import Preempted as Preempted


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None, command: Sequence[str] = ()) -> Path:
    """Fine-tune a model as the recipe says.

    Args:
        recipe: what to train, on what and how, e.g. from `load_recipe`.
        resume: go on from the newest whole checkpoint in `recipe.run.output`; without one, from the beginning.
        console: where progress is shown; by default the standard output.
        command: what the user typed, kept in `run.json`.

    Returns:
        The output folder: a plain Hugging Face checkpoint with `run.json` beside it.

    Raises:
        UsageError: something in the recipe, the data or the model cannot be used, or training came to nothing; what had
            been written before is whole.
        Preempted: SIGTERM or SIGINT has come, which are watched while it trains; a checkpoint is kept. It is a
            `SystemExit` with code 143 or 130.

    Example:
        >>> train(load_recipe("recipes/gsm8k.yaml", ["run.steps=100"]))  # doctest: +SKIP
    """
    console = console or Console()
    with collected_messages(console) as messages:
        from ._run import run

        return run(recipe, resume=resume, command=command, console=console, messages=messages)
