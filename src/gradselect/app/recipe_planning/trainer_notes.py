"""Notes of a plan on what a trainer needs beside the training step that the plan counts."""

from __future__ import annotations

from collections.abc import Iterator

from peft import PeftModel
from torch import nn

from gradselect.app.recipe import AbstractSamplingTrainer, AbstractTrainer, KtoSettings, Recipe
from gradselect.core import num_bytes
from gradselect.usage import write_size


def trainer_notes(recipe: Recipe, model: nn.Module) -> Iterator[str]:
    """Yield what the plan does not count: the reference, further forward passes, and the drawing of answers.

    Args:
        recipe: the recipe.
        model: model as the method trains it, on the meta device.
    """
    trainer = recipe.trainer
    if not isinstance(trainer, AbstractTrainer):
        return
    name = f"trainer.name={getattr(trainer, 'name', '')}"
    if trainer.uses_reference:
        yield f"{name}: {_reference(trainer, model)}"
    if isinstance(trainer, KtoSettings) and trainer.loss == "kto":
        yield f"{name}: the time leaves out a forward pass without gradients, which estimates the divergence"
    if isinstance(trainer, AbstractSamplingTrainer):
        yield (
            f"{name}: neither the time of drawing answers nor the keys and values that are kept meanwhile are counted; "
            "rows are taken to be data.max_length long, prompt and answer together"
        )


def _reference(trainer: AbstractTrainer, model: nn.Module) -> str:
    time = "the time leaves out its forward pass in each step"
    if getattr(trainer, "precompute_reference", False):
        return "the reference is computed before the first step; the plan counts neither that time nor any bytes for it"
    if isinstance(model, PeftModel):
        return f"where an adapter trains, the reference is the model without it and takes no memory; {time}"
    size = sum(map(num_bytes, model.parameters()))
    copy = f"the frozen copy of the model that is the reference, {write_size(size)}"
    return f"where the model's own weights train, the peaks leave out {copy}; {time}"
