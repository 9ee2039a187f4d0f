"""Propulsion: the outputs of a layer, each times a power of a learned number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import Parameter, ParameterDict
from transformers.pytorch_utils import Conv1D

from gradselect.usage import check_whole

from .config import AdapterConfig
from .layer import AdapterLinear
from .registration import register
from .tuner import AdapterTuner


@final
@dataclass
class PropulsionConfig(AdapterConfig):
    """Propulsion: y' = y ⊙ z^k for the output y of a layer, bias included. z begins as 1.

    One number for each output trains. Its step is amplified: with AdamW a step of the learning rate moves the factor
    of an output by about k times the learning rate.

    What is stored is z - 1, so that weight decay of any optimizer would pull to the base model and not to outputs of
    zero; and by its name, "propulsion_scale_bias", transformers' Trainer leaves it out of weight decay, as the
    optimizers of this library leave out every tensor of one dimension.

    Args:
        degree: k. The paper has 15 for language models, SST-2, QQP and RTE, 55 for QNLI and MRPC, 20 for the rest of
            GLUE, 25 to 35 for question answering and summaries.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from gradselect.adapters import PropulsionConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
        >>> model = get_peft_model(model, PropulsionConfig(target_modules=["0"], degree=20))
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        4

    Reference: Kowsher, Prottasha, Bhat, "Propulsion: Steering LLM with Tiny Fine-Tuning", arXiv 2409.10927,
    equations 1 to 3.
    """

    method: ClassVar[str] = "propulsion"

    degree: int = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("degree", self.degree)


@final
class PropulsionLinear(AdapterLinear):
    """A linear layer or embedding with scaled outputs."""

    adapter_layer_names = ("propulsion_scale_bias",)
    known_layers = (nn.Linear, Conv1D, nn.Embedding)
    propulsion_scale_bias: ParameterDict

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.degrees: dict[str, int] = {}
        super().__init__(*args, **kwargs)

    def add(self, adapter: str, config: PropulsionConfig) -> None:
        self.degrees[adapter] = config.degree
        self.propulsion_scale_bias[adapter] = Parameter(torch.zeros(self.out_features))

    def scale(self, adapter: str) -> Tensor:
        """Return z^k, the factor of each output."""
        return (1 + self.propulsion_scale_bias[adapter]).pow(self.degrees[adapter])

    def after(self, adapter: str, y: Tensor, x: Tensor) -> Tensor:
        scale = self.scale(adapter)
        # Promoted inside the product: what autograd keeps of y stays as small as y.
        return (y * scale).to(y.dtype)

    def transformed(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.scale(adapter).to(weight.dtype)
        return scale.unsqueeze(-1) * weight, None if bias is None else scale * bias


@final
class PropulsionModel(AdapterTuner):
    """PEFT's side of Propulsion."""

    prefix = "propulsion_"
    tuner_layer_cls = PropulsionLinear


register(PropulsionConfig, PropulsionModel)
