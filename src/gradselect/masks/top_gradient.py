"""TopGradient: the entries of largest gradient of each step. The mask of SparseGrad and of MeProp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from gradselect.entries import AbstractCompactMask, TopOfGradient
from gradselect.usage import check_positive


@final
@dataclass(eq=False, kw_only=True)
class TopGradient(AbstractCompactMask):
    r"""Select, at each step, the k entries of largest |g| in each tensor.

        k = max(1, round(density * entries of the tensor))

    An entry that stays keeps its moments and its age. An entry that returns later starts with zero moments.

    Args:
        density: share of the entries of each tensor, in (0, 1].
        among: names or globs of the candidate parameters. None: all.

    Raises:
        UsageError: a density outside (0, 1].

    Example:
        MeProp with 1 % of the entries of every MLP matrix of a Llama:

        >>> mask = TopGradient(density=0.01, among=("*.mlp.*",))

    Reference: Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers", arXiv
    2410.07383, which applies it in a rotated basis. Without rotation it is the paper's baseline MeProp. Sun et al.,
    "meProp: Sparsified Back Propagation for Accelerated Deep Learning with Reduced Overfitting", arXiv 1706.06197.
    """

    density: float

    def __post_init__(self) -> None:
        check_positive("density", self.density, at_most=1, example=0.01)

    def start(self) -> None:
        self._counts = {tensor.name: max(1, round(self.density * tensor.numel)) for tensor in self.tensors}

    def choice(self, step: int, num_chosen: int) -> TopOfGradient:
        return TopOfGradient(self._counts, replace=True)

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient.abs()

    def least_gradient(self, score: float) -> float:
        return score
