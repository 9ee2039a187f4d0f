"""Figures with their 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

Interval = tuple[float, float]
"""Lower and upper limit."""

NORMAL_95 = 1.959963984540054
"""The normal deviate that 2.5 % of the mass lies above."""


def wilson_interval(*, num_correct: int, num_items: int) -> Interval:
    """95 % interval of a share, by the score method; it holds near 0 and 1 too, where the normal one does not.

        (p + z²/2n ± z sqrt(p (1-p)/n + z²/4n²)) / (1 + z²/n),   p = num_correct / num_items

    Reference: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    assert 0 <= num_correct <= num_items
    assert num_items > 0
    n, z = num_items, NORMAL_95
    p = num_correct / n
    centre = p + z * z / (2 * n)
    width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n correct the limits are 0 and 1 exactly, but for rounding.
    return max(0.0, min(p, (centre - width) / scale)), min(1.0, max(p, (centre + width) / scale))


def mean_loss(losses: Sequence[float], num_tokens: Sequence[int]) -> float:
    """Nats per token over all items: sum of the items' summed losses / sum of their tokens."""
    return math.fsum(losses) / sum(num_tokens)


def mean_loss_interval(losses: Sequence[float], num_tokens: Sequence[int]) -> Interval | None:
    """95 % interval of `mean_loss` when the items, not the tokens, are drawn independently; None for a single item.

    A ratio R = sum L_i / sum t_i of item totals has the linearised variance n/(n-1) sum (L_i - R t_i)² / (sum t_i)².

    Reference: W. G. Cochran, "Sampling Techniques", 3rd edition (1977), equation 6.13.
    """
    n = len(losses)
    if n < 2:
        return None
    ratio = mean_loss(losses, num_tokens)
    squares = math.fsum((loss - ratio * tokens) ** 2 for loss, tokens in zip(losses, num_tokens, strict=True))
    error = math.sqrt(n / (n - 1) * squares) / sum(num_tokens)
    return ratio - NORMAL_95 * error, ratio + NORMAL_95 * error
