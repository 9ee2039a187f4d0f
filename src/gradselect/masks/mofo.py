"""MoFO: the entries of largest momentum, selected at each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from gradselect.entries import AbstractDenseMask
from gradselect.parallel import local_part
from gradselect.usage import check_positive

from .gmt import kth_largest_magnitude


@final
@dataclass(eq=False, kw_only=True)
class MoFO(AbstractDenseMask):
    r"""Move, in each tensor, the entries whose momentum |m| is at least the k-th largest, k = max(1, fraction n).

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2     of all n entries
        w_i <- AdamW's update           where |m_i| >= tau, tau the k-th largest |m|
        w_i unchanged                   otherwise

    k is rounded down. Moments see the gradients of all entries, so the optimizer state is that of dense AdamW: the
    method reduces the movement of the weights, and with it what is forgotten, not memory. Tensors of fewer than two
    dimensions move whole. All entries that tie with the k-th move, so all do where fewer than k moments differ from
    zero.

    From the paper and the authors' code: the filter of each tensor by the moment that holds the step's gradient;
    vectors move whole. Ours: weight decay acts on entries that move only, where the authors' code decays all weights.

    Args:
        fraction: share of the entries of each tensor to move, in (0, 1]. Default 0.15: the paper's experiments take 10
            or 15 %, the authors' code has a default of 3 %.
        among: names or globs of the parameters to train; others are frozen. None: all.

    Raises:
        UsageError: a fraction outside (0, 1]; in the optimizer, a rule without momentum.

    Example:
        >>> mask = MoFO(fraction=0.15)

    Reference: Chen et al., "MoFO: Momentum-Filtered Optimizer for Mitigating Forgetting in LLM Fine-Tuning", arXiv
    2407.20999.
    """

    method_name = "mofo"
    ranks = "momentum"

    fraction: float = 0.15
    mask: Literal["gradient", "update"] = field(default="update", init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("fraction", self.fraction, at_most=1, example=0.15)

    def start(self) -> None:
        pass

    def masks(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        return [self._mask(moment) for moment in gradients]

    def _mask(self, moment: Tensor) -> Tensor:
        mine = local_part(moment)
        if moment.ndim < 2:
            return torch.ones_like(mine, dtype=torch.bool)
        count = max(1, int(self.fraction * moment.numel()))
        threshold = kth_largest_magnitude([moment], count)
        # Two comparisons instead of |m|: they allocate one byte per entry, not a copy of the moment.
        return (mine >= threshold) | (mine <= -threshold)
