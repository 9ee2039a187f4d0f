"""Entry point of a search: checks for Optuna, reads the ranges, keeps the messages."""

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
    """Search the values of a recipe with the smallest validation loss.

    The first trial has the recipe's own values; a tree-structured Parzen estimator (TPE) proposes the next ones. Every
    `run.evaluate_every` steps, a trial that is worse than the median of the finished ones is pruned. Trials save no
    model.

    Args:
        recipe: needs `data.validation`.
        study: folder of the trials; by default `run.output` with "-tune" appended. If it holds the same study, the
            search resumes.
        num_trials: number of trials that the study has in the end.
        search: ranges as on the command line, "optimizer.lr=1e-5:1e-3:log". Default: the learning rate from a tenth to
            ten times the recipe's and, where the method has them, fraction (half to twice) and delta (a tenth to a
            thousand times).
        seed: seed of the proposals. Same seed and recipe give the same trials, interrupted or not.
        console: where progress is shown; by default standard output.

    Returns:
        The recipe with the best values, its file, and all trials.

    Raises:
        UsageError: Optuna is not installed, the recipe has no validation examples, a range does not fit, the folder
            holds something else, or no trial finished.

    Example:
        >>> result = tune(load_recipe("recipes/gsm8k.yaml"), num_trials=12)  # doctest: +SKIP
        >>> result.recipe.optimizer.lr, result.best.loss  # doctest: +SKIP
    """
    if find_spec("optuna") is None:
        raise UsageError("tuning needs optuna; run: pip install optuna")
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
