"""BitFit: train the biases only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import nn

from gradselect.entries import AbstractCompactMask, FromWeights, Indices, MaskTensor
from gradselect.usage import UsageError


@final
@dataclass(eq=False, kw_only=True)
class BitFit(AbstractCompactMask):
    """Select all entries of the biases at step 0; the set never changes.

    A bias is a tensor of one dimension whose own name contains "bias". Many decoders have none. `among` names other
    tensors of one dimension to train instead: `("*norm*",)` for the norms, `("*",)` for all.

    Args:
        among: names or globs of parameters; those of one dimension train. None: the biases.

    Raises:
        UsageError: at `bind`, a model without such tensors.

    Example:
        >>> mask = BitFit()
        >>> norms_of_a_llama = BitFit(among=("*norm*",))

    Reference: Ben Zaken, Ravfogel, Goldberg, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
    Masked Language-models", arXiv 2106.10199. Training norms in models without biases is our choice.
    """

    method_name = "bitfit"

    def bind(self, tensors: Sequence[MaskTensor]) -> Self:
        if self.among is None and not any(map(self.can_use, tensors)):
            raise UsageError(
                "BitFit trains biases, but no trainable parameter is a bias; "
                'write e.g. BitFit(among=("*norm*",)) to train the norms instead'
            )
        return super().bind(tensors)

    def can_use(self, tensor: MaskTensor) -> bool:
        is_bias = "bias" in tensor.name.rpartition(".")[2]
        return tensor.parameter.ndim == 1 and (is_bias or self.among is not None)

    def start(self) -> None:
        pass

    def choice(self, step: int, num_chosen: int) -> FromWeights | None:
        return FromWeights() if step == 0 else None

    def choose(self, step: int, model: nn.Module) -> Indices:
        return {tensor.name: torch.arange(tensor.numel, device=tensor.parameter.device) for tensor in self.tensors}
