"""Prompts of a step of a trainer that draws answers to them."""

from __future__ import annotations

from datasets import Dataset

from gradselect import UsageError
from gradselect.app.recipe import AbstractSamplingTrainer, Recipe
from gradselect.app.runtime import num_processes


def num_prompts_per_step(settings: AbstractSamplingTrainer, *, batch_size: int, accumulation: int) -> int:
    """Return the number of different prompts in a step, over all processes."""
    return batch_size * accumulation * num_processes() // settings.num_generations


def check_prompts(rows: Dataset, recipe: Recipe, settings: AbstractSamplingTrainer) -> None:
    """Refuse rows that do not fill a step.

    Raises:
        UsageError: says how many a step takes.
    """
    run = recipe.run
    number = num_prompts_per_step(settings, batch_size=run.batch_size, accumulation=run.accumulation)
    if len(rows) < number:
        raise UsageError(
            f"a step takes {number} different prompts (run.batch_size={run.batch_size} x run.accumulation="
            f"{run.accumulation} answers, trainer.num_generations={settings.num_generations} to each), but there are "
            f"{len(rows)}; give more rows, or lower run.batch_size or run.accumulation"
        )
