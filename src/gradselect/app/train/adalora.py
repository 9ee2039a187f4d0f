"""AdaLoRA in a training loop: lower ranks after each step, and a penalty in the loss."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from gradselect.app.recipe import AdaLoraMethod


class RankCallback(TrainerCallback):
    """Lowers the ranks of an AdaLoRA after each update, before gradients are freed."""

    def __init__(self, method: AdaLoraMethod, model: PeftModel) -> None:
        self._method = method
        self._model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._method.schedule(self._model.active_peft_config, num_steps=state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Ranks depend on gradients, and a skipped step has none.
        if any(parameter.grad is not None for parameter in self._model.parameters()):
            cast(Any, self._model.base_model).update_and_allocate(state.global_step)


class OrthogonalityPenalty:
    """weight * mean over all A and B of ||A A^T - I||_F or ||B^T B - I||_F.

    PEFT adds it to the loss that the model computes. Trainers that compute their own loss would lose it.

    Reference: Zhang et al., "AdaLoRA", arXiv 2303.10512, equation 4, with the norm as in PEFT, not squared.
    """

    def __init__(self, model: PeftModel, *, weight: float) -> None:
        self._weight = weight
        self._factors = [(name, factor) for name, factor in model.named_parameters() if ".lora_A." in name]
        self._transposed = [(name, factor) for name, factor in model.named_parameters() if ".lora_B." in name]

    def __call__(self) -> Tensor:
        grams = [factor @ factor.T for _, factor in self._factors]
        grams += [factor.T @ factor for _, factor in self._transposed]
        norms = [torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]
        return self._weight * torch.stack(norms).mean()


def ranks(model: PeftModel) -> dict[str, int]:
    """Return the current rank of each matrix, its number of nonzero singular values, by name of the adapter."""
    return {
        name: int(torch.count_nonzero(parameter)) for name, parameter in model.named_parameters() if ".lora_E." in name
    }
