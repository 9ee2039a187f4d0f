"""Random numbers of policies: counter-based streams, the same on every rank and after a resume."""

from __future__ import annotations

import math
import random


def stream(*, seed: int, step: int, purpose: str) -> random.Random:
    """A generator of its own for one purpose at one step: nothing to save, nothing global, alike on every rank."""
    return random.Random(f"gradselect/{seed}/{step}/{purpose}")


def open_uniform(generator: random.Random) -> float:
    """A draw from (0, 1), both ends excluded: its logarithm, and that of its logarithm, are finite."""
    return (generator.getrandbits(52) + 0.5) / 2**52


def log_gamma(generator: random.Random, shape: float) -> float:
    """log X with X ~ Gamma(shape, 1). Such draws X_b divided by their sum are a draw from Dirichlet(shapes).

    X = Y U^(1/shape) with Y ~ Gamma(shape + 1, 1): in logarithms a small shape, where X itself underflows, is harmless.
    """
    return math.log(generator.gammavariate(shape + 1, 1.0)) + math.log(open_uniform(generator)) / shape


def gumbel(generator: random.Random) -> float:
    """A draw G of Gumbel's law. The k largest log w_b + G_b are k draws without replacement with probabilities ∝ w_b.

    Reference: Kool, van Hoof, Welling, "Stochastic Beams and Where to Find Them", arXiv 1903.06059.
    """
    return -math.log(-math.log(open_uniform(generator)))
