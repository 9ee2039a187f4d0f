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
        steps: optimizer steps over which they are unmasked, T; usually the length of the training. None: an
            integration that knows the length calls `fill_steps`.
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
    steps: int | None = None
    exponent: float = 1.0
    eps: float = 0.1

    def __post_init__(self) -> None:
        check_size(budget=self.budget, density=self.density)
        if self.steps is not None:
            check_whole("steps", self.steps)
        check_positive("eps", self.eps, example=0.1)
        if not isinstance(self.exponent, int | float) or not math.isfinite(self.exponent):
            raise UsageError(f"exponent={self.exponent!r} is not a finite number; write e.g. exponent=1.0")

    def start(self) -> None:
        self._budget = resolve_budget(self.tensors, budget=self.budget, density=self.density)

    def choice(self, step: int, num_chosen: int) -> TopOfGradient | None:
        if self.steps is None and self.filled_steps is None:
            # Gradients must flow, so that the step can say what is missing.
            return TopOfGradient(1)
        missing = self.num_unmasked(step) - num_chosen
        return TopOfGradient(missing) if missing > 0 else None

    def num_unmasked(self, step: int) -> int:
        """Return the number of unmasked entries after step `step` (from 0)."""
        all_steps = self._known_steps()
        each, remainder = divmod(self._budget, all_steps)
        num_steps = min(step + 1, all_steps)
        return num_steps * each + min(num_steps, remainder)

    def fill_steps(self, num_steps: int) -> None:
        check_whole("steps", num_steps)
        if self.steps is None and self.filled_steps is None:
            self.filled_steps = num_steps

    def check_ready(self) -> None:
        self._known_steps()

    def _known_steps(self) -> int:
        num_steps = self.filled_steps if self.steps is None else self.steps
        if num_steps is None:
            raise UsageError(
                "steps=None is still open; write ID3(..., steps=1000) with the number of optimizer steps, or train "
                "through an integration that fills it in"
            )
        return num_steps

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient.abs().div_(weight.abs().add_(self.eps).pow_(self.exponent))

    def least_gradient(self, score: float) -> float:
        # |w| >= 0, so the denominator is at least eps ** exponent, unless a negative exponent makes it fall with |w|.
        return score * self.eps**self.exponent * (1 - 1e-5) if self.exponent >= 0 else 0.0
