"""The penalty of AdaLoRA in the loss."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor


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
