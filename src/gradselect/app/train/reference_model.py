"""The reference of a loss: the model before training, as a frozen copy or as the model without its adapter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from gradselect import UsageError
from gradselect.app.models import at_rest
from gradselect.app.recipe import AbstractTrainer, Recipe
from gradselect.core import num_bytes
from gradselect.usage import write_size

NUM_TOKENS = 8
"""Tokens of the row that shows if an adapter changes the model before training."""


def reference_copy(model: Any) -> Any:
    """Return a frozen copy of a model. Call it before the first step, and before a checkpoint is loaded."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def drop_reference_adapter(model: nn.Module) -> None:
    """Delete the copy of the adapter that TRL adds as the reference.

    It would be counted and saved. An adapter is neutral before training, so the model without it is the same reference.
    """
    if isinstance(model, PeftModel) and "ref" in model.peft_config:
        model.delete_adapter("ref")


def reference_notes(recipe: Recipe, model: nn.Module) -> list[str]:
    """Say where the reference comes from, and what it takes."""
    trainer = recipe.trainer
    if not isinstance(trainer, AbstractTrainer) or not trainer.uses_reference:
        return []
    name = f"trainer.name={recipe.trainer.name if recipe.trainer else ''}"
    if getattr(trainer, "precompute_reference", False):
        return [f"{name} computes the reference before the first step and keeps no second model"]
    if isinstance(model, PeftModel):
        return [f"{name} takes the model with its adapter switched off as the reference: there is no second model"]
    size = sum(map(num_bytes, model.parameters()))
    return [
        f"{name} keeps a frozen copy of the weights before training as the reference: {write_size(size)} beside the "
        "weights, gradients and optimizer state that the lines below count"
    ]


@torch.no_grad()
def check_neutral(model: PeftModel, tokens: list[int]) -> None:
    """Check that a new adapter changes nothing yet: without it the model must be the one before training.

    Args:
        model: model with the adapter.
        tokens: tokens that the model can read.

    Raises:
        UsageError: it does.
    """
    device = next(model.parameters()).device
    batch = {"input_ids": torch.tensor([tokens[:NUM_TOKENS]], device=device), "use_cache": False}
    with at_rest(model):
        adapted = model(**batch).logits
        with model.disable_adapter():
            plain = model(**batch).logits
    if not torch.allclose(adapted, plain, atol=1e-3, rtol=1e-2):
        raise UsageError(
            f"method: this adapter changes the model before its first step (logits by up to "
            f"{(adapted - plain).abs().max():.2g}), so the model without it is not the reference; choose an adapter "
            "that starts as the base model, e.g. method.name=lora, or method.options.init_lora_weights=true"
        )
