"""Bootstrap over items and seeds, for all methods at once.

The draws are made once and shared by all methods. So methods are compared on the same items and seeds, and a table of
25 methods costs no more than a table of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_DRAWS = 4000
DRAWS_AT_ONCE = 500
"""Draws in memory together: 500 x 1319 items are 5 MB."""


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Outcomes of several runs on the same items. The value of a run is `gains.sum() / weights.sum()`.

    Args:
        gains: shape (runs, items); 1 for a right answer, or the summed loss of an item.
        weights: shape (items,); 1, or the tokens of an item.
    """

    gains: np.ndarray  # (9, 1319)
    weights: np.ndarray  # (1319,)

    def values(self) -> np.ndarray:  # (runs,)
        """Value of each run."""
        return self.gains.sum(1) / self.weights.sum()

    def draw(self) -> np.ndarray:  # (NUM_DRAWS, runs)
        """Draw items with replacement, the same for all runs, and return the values of the runs on them."""
        generator = np.random.default_rng(0)
        num_items = len(self.weights)
        shares = np.full(num_items, 1 / num_items)
        drawn = []
        for done in range(0, NUM_DRAWS, DRAWS_AT_ONCE):
            counts = generator.multinomial(num_items, shares, size=min(DRAWS_AT_ONCE, NUM_DRAWS - done))
            drawn.append(counts @ self.gains.T / (counts @ self.weights)[:, None])
        return np.concatenate(drawn)


def draw_means(drawn: np.ndarray) -> np.ndarray:
    """Draw seeds too, and return the means over them.

    Of n seeds n - 1 are drawn with replacement, which keeps the variance of the mean unbiased. A single seed is not
    drawn: its spread is that of the items.

    References: J. N. K. Rao, C. F. J. Wu, "Resampling inference with complex survey data", JASA 83 (1988), for n - 1;
    A. B. Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1 (2007), for items and seeds at once.

    Args:
        drawn: shape (draws, seeds), e.g. (4000, 3).

    Returns:
        Shape (draws,).
    """
    num_draws, num_seeds = drawn.shape
    if num_seeds == 1:
        return drawn[:, 0]
    # The generator starts the same for every method, so all methods get the same seeds.
    places = np.random.default_rng(1).integers(num_seeds, size=(num_draws, num_seeds - 1))
    return np.take_along_axis(drawn, places, axis=1).mean(1)


def degrees_of_freedom(drawn: np.ndarray, *, num_items: int) -> float:
    """Degrees of freedom of the variance of `draw_means(drawn)`, by Satterthwaite.

        V = V_s + V_i,    df = V² / (V_s² / (seeds - 1) + V_i² / (items - 1))

    V_i is the variance over items with the seeds as they are, V_s the rest, which is that over seeds. If seeds differ
    more than items do, three of them have two degrees of freedom, and not the normal distribution's.

    Reference: F. E. Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics
    Bulletin 2 (1946).

    Args:
        drawn: shape (draws, seeds); values of the runs on drawn items.
        num_items: number of items.
    """
    num_seeds = drawn.shape[1]
    whole, of_items = float(draw_means(drawn).var(ddof=1)), float(drawn.mean(1).var(ddof=1))
    if num_seeds == 1 or whole <= 0:
        return num_items - 1.0
    of_seeds = max(0.0, whole - of_items)
    return (of_seeds + of_items) ** 2 / (of_seeds**2 / (num_seeds - 1) + of_items**2 / (num_items - 1))
