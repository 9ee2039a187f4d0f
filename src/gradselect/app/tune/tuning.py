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

    from .adapters import AdapterResult
    from .search_loop import TuneResult
    from .study_folder import StudyFolder


def tune(
    recipe: Recipe,
    *,
    study: str | Path | None = None,
    num_trials: int = 20,
    search: Sequence[str] = (),
    seed: int = 0,
    sampler: str = "tpe",
    fit: int | None = None,
    console: Console | None = None,
) -> TuneResult:
    """Search the values of a recipe with the smallest validation loss.

    The first trial has the recipe's own values; a tree-structured Parzen estimator (TPE) or CMA-ES proposes the next
    ones. Every `run.evaluate_every` steps, a trial that is worse than the median of the finished ones is pruned. A
    trial whose planned peak does not fit the memory is vetoed before it starts. Trials save no model. Several processes
    may work on one study: each returns when the study has enough trials.

    Args:
        recipe: needs `data.validation`.
        study: folder of the trials; by default `run.output` with "-tune" appended. If it holds the same study, the
            search resumes.
        num_trials: number of trials that the study has in the end, without vetoed ones.
        search: ranges as on the command line, "optimizer.lr=1e-5:1e-3:log". Default: the learning rate from a tenth to
            ten times the recipe's and, where the method has them, fraction (half to twice) and delta (a tenth to a
            thousand times).
        seed: seed of the proposals. In one process the same seed and recipe give the same trials, interrupted or not.
        sampler: "tpe" or "cmaes".
        fit: bytes that a trial may take. Default: the memory of the device that trains.
        console: where progress is shown; by default standard output.

    Returns:
        The recipe with the best values, its file, and all trials.

    Raises:
        UsageError: Optuna or cmaes is not installed, the recipe has no validation examples, a range does not fit, the
            folder holds something else, or no trial finished.

    Example:
        >>> result = tune(load_recipe("recipes/gsm8k.yaml"), num_trials=12)  # doctest: +SKIP
        >>> result.recipe.optimizer.lr, result.best.loss  # doctest: +SKIP
    """
    if num_trials < 1:
        raise UsageError(f"--trials {num_trials}: give a positive number, e.g. --trials 20")
    check_optuna()
    from rich.console import Console

    from gradselect.app.runtime import collected_messages

    console = console or Console()
    with collected_messages(console) as messages:
        from .proposals import check_sampler
        from .ranges import read_ranges
        from .search_loop import SearchOptions
        from .search_loop import search as carry_out

        folder = _folder(recipe, study)
        options = SearchOptions(
            ranges=read_ranges(search, recipe),
            num_trials=num_trials,
            seed=seed,
            sampler=check_sampler(sampler),
            limit=fit,
        )
        try:
            return carry_out(recipe, folder=folder, options=options, console=console)
        finally:
            folder.keep_messages(messages)


def tune_adapters(
    recipe: Recipe,
    *,
    study: str | Path | None = None,
    budget: int | None = None,
    ranks: Sequence[int] = (1, 4, 8),
    seed: int = 0,
    console: Console | None = None,
) -> AdapterResult:
    """Search for the layers that get a LoRA and for their ranks, within a budget of parameters, by BIPEFT.

    One search of at most the recipe's steps. Weights learn from the training examples and the choices from the
    validation examples. The result is a recipe with an ordinary LoRA of PEFT, which trains from the start.

    Args:
        recipe: needs `data.validation` and the method `lora`.
        study: folder of the result; by default `run.output` with "-tune" appended.
        budget: largest number of parameters of the adapter. Default: as many as the recipe's rank on all its targets.
        ranks: ranks that a layer may get, ascending. A layer may also get none.
        seed: seed of the draws.
        console: where progress is shown; by default standard output.

    Returns:
        The recipe with the adapter that was found, its file, and the ranks by layer.

    Raises:
        UsageError: the method is not a plain LoRA, there are no validation examples, budget or ranks do not fit, or the
            folder holds something else.

    Example:
        >>> result = tune_adapters(load_recipe("recipes/lora-search.yaml"))  # doctest: +SKIP
        >>> result.allocation.ranks  # doctest: +SKIP
    """
    from rich.console import Console

    from gradselect.app.runtime import collected_messages

    console = console or Console()
    with collected_messages(console) as messages:
        from .adapters import search_adapters

        folder = _folder(recipe, study)
        try:
            return search_adapters(recipe, folder=folder, budget=budget, ranks=tuple(ranks), seed=seed, console=console)
        finally:
            folder.keep_messages(messages)


def check_optuna() -> None:
    """Check that Optuna is installed.

    Raises:
        UsageError: it is not.
    """
    if find_spec("optuna") is None:
        raise UsageError("tuning needs optuna; run: pip install optuna")


def _folder(recipe: Recipe, study: str | Path | None) -> StudyFolder:
    from .study_folder import StudyFolder

    return StudyFolder(Path(study) if study is not None else Path(f"{recipe.run.output}-tune"))
