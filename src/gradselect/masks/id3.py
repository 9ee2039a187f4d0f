"""ID3: unmask entries step by step, where the gradient is large relative to the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from gradselect.entries import AbstractCompactMask, TopOfGradient, check_size, resolve_budget
from gradselect.usage import UsageError, check_positive, check_whole


@final
@dataclass(eq=False, kw_only=True)
class ID3(AbstractCompactMask):
    r"""Add the B / T still masked entries of largest D3 at each of T steps; no entry ever leaves the set.

        D3 = |g| / (|w| + eps) ** exponent                  over all tensors together

    The first B mod T steps unmask one more entry than the others, so any budget works with any number of steps, also
    T > B. A new entry is updated in the same step. After T steps the set holds B entries and no longer changes.

    Args:
        budget: total number of entries to unmask, B.
        density: share of the entries, instead of `budget`: B = max(1, round(density * entries)).
        steps: optimizer steps over which they are unmasked, T; usually the length of the training.
        exponent: preference for small weights; 0 uses the gradient only. Best between 1 and 2 in the paper. Default
            1.0.
        eps: > 0, keeps the score finite. Best between 0.1 and 1 in the paper. Default 0.1.
        among: names or globs of the candidate parameters. None: all.

    Raises:
        UsageError: a value out of range; at `bind`, a budget of more entries than there are.

    Example:
        >>> mask = ID3(budget=320_000, steps=1000)

    Reference: Agarwal et al., "Step-by-Step Unmasking for Parameter-Efficient Fine-tuning of Large Language Models",
    arXiv 2408.14470. Giving the remainder to the first steps follows the authors' code.
    """

    method_name = "id3"

    budget: int | None = None
    density: float | None = None
    steps: int
    exponent: float = 1.0
    eps: float = 0.1

    def __post_init__(self) -> None:
        check_size(budget=self.budget, density=self.density)
        check_whole("steps", self.steps)
        check_positive("eps", self.eps, example=0.1)
        if not isinstance(self.exponent, int | float) or not math.isfinite(self.exponent):
            raise UsageError(f"exponent={self.exponent!r} is not a finite number; write e.g. exponent=1.0")

    def start(self) -> None:
        self._budget = resolve_budget(self.tensors, budget=self.budget, density=self.density)

    def choice(self, step: int, num_chosen: int) -> TopOfGradient | None:
        missing = self.num_unmasked(step) - num_chosen
        return TopOfGradient(missing) if missing > 0 else None

    def num_unmasked(self, step: int) -> int:
        """Return the number of unmasked entries after step `step` (from 0)."""
        each, remainder = divmod(self._budget, self.steps)
        num_steps = min(step + 1, self.steps)
        return num_steps * each + min(num_steps, remainder)

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient.abs().div_(weight.abs().add_(self.eps).pow_(self.exponent))

    def least_gradient(self, score: float) -> float:
        # |w| >= 0, so the denominator is at least eps ** exponent, unless a negative exponent makes it fall with |w|.
        return score * self.eps**self.exponent * (1 - 1e-5) if self.exponent >= 0 else 0.0
