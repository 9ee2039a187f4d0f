"""Description of a search, and the check that it can run."""

from __future__ import annotations

from typing import Any

from gradselect import UsageError
from gradselect.app.inputs import Inputs
from gradselect.app.recipe import AbstractSamplingTrainer, Recipe
from gradselect.app.runtime import check_one_process, take_device
from gradselect.app.train import describe_start


def check_search(recipe: Recipe) -> None:
    """Check that one process trains with validation examples whose loss measures the model.

    Raises:
        UsageError: it does not.
    """
    check_one_process()
    take_device(recipe.run.device)
    if recipe.data.validation is None:
        raise UsageError(
            "trials are compared by their loss on validation examples, and data.validation is not set; "
            "hold out a share of the training rows, e.g. data.validation=0.05, or name a file"
        )
    if isinstance(trainer := recipe.trainer, AbstractSamplingTrainer):
        raise UsageError(
            f"trials are compared by their loss on validation examples, which with trainer.name={trainer.name} says "
            "nothing of how good the answers are; train a recipe for each value, and compare what `gradselect "
            "evaluate` finds on held-out prompts"
        )


def described(recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """Return recipe, model, data, versions and machine of a search."""
    start = describe_start(recipe, inputs, command=()).values()
    return {key: start[key] for key in ("started_at", "recipe", "model", "data", "versions", "machine")}
