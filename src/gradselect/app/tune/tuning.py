"""Entry point of a search: checks that Optuna is there, reads the ranges, keeps the messages."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gradselect import UsageError
from gradselect.app.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from .search_loop import TuneResult


def tune(
    recipe: Recipe,
    *,
    study: str | Path | None = None,
    num_trials: int = 20,
    search: Sequence[str] = (),
    seed: int = 0,
    console: Console | None = None,
) -> TuneResult:
    """Train with other values again and again, and keep those of the smallest validation loss.

    The first trial has the recipe's own values; the next ones are proposed by a tree-structured Parzen estimator. At
    every `run.evaluate_every` steps a trial that is worse than the median of the finished ones is pruned. Trials leave
    no model.

    Args:
        recipe: needs `data.validation`.
        study: the folder to keep the trials in; by default that of `run.output` with "-tune" behind. Where the same
            study lies already, it goes on: what is done is not done again.
        num_trials: how many trials the study is to have in the end.
        search: ranges as the command line takes them, "optimizer.lr=1e-5:1e-3:log". By default the learning rate, a
            tenth to ten times of the recipe's, and, where the method has them, fraction (half to twice) and delta (a
            tenth to a thousand times).
        seed: of the proposals. Same seed, same recipe: same trials, interrupted or not.
        console: where progress is shown; by default the standard output.

    Returns:
        The recipe with the best values, the file that it was written to, and all trials.

    Raises:
        UsageError: Optuna is not installed, the recipe has no validation examples, a range does not fit, the folder
            holds something else, or no trial came to its end.

    Example:
        >>> result = tune(load_recipe("recipes/gsm8k.yaml"), num_trials=12)  # doctest: +SKIP
        >>> result.recipe.optimizer.lr, result.best.loss  # doctest: +SKIP
    """
    if find_spec("optuna") is None:
        raise UsageError("tuning needs optuna; run: pip install 'gradselect[tune]'")
    from rich.console import Console

    from gradselect.app.runtime import collected_messages

    console = console or Console()
    with collected_messages(console) as messages:
        from .ranges import read_ranges
        from .search_loop import search as carry_out
        from .study import StudyFolder

        folder = StudyFolder(Path(study) if study is not None else Path(f"{recipe.run.output}-tune"))
        ranges = read_ranges(search, recipe)
        try:
            return carry_out(recipe, folder=folder, ranges=ranges, num_trials=num_trials, seed=seed, console=console)
        finally:
            folder.keep_messages(messages)
