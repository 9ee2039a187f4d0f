"""Random numbers of policies: counter-based streams, equal on all ranks and after a resume."""

from __future__ import annotations

import math
import random


def random_stream(*, seed: int, step: int, purpose: str) -> random.Random:
    """Return a generator for one purpose at one step: no state to save, nothing global, equal on all ranks."""
    return random.Random(f"gradselect/{seed}/{step}/{purpose}")


def open_uniform(generator: random.Random) -> float:
    """Draw from the open interval (0, 1), so that log(u) and log(-log(u)) are finite."""
    return (generator.getrandbits(52) + 0.5) / 2**52


def log_gamma(generator: random.Random, shape: float) -> float:
    """Draw log X with X ~ Gamma(shape, 1). Draws X_b divided by their sum are a draw from Dirichlet(shapes).

    X = Y U^(1/shape) with Y ~ Gamma(shape + 1, 1). The logarithm stays finite for a small shape, where X underflows.
    """
    return math.log(generator.gammavariate(shape + 1, 1.0)) + math.log(open_uniform(generator)) / shape


def gumbel(generator: random.Random) -> float:
    """Draw G from the Gumbel distribution. The k largest log w_b + G_b are k draws without replacement, P(b) ∝ w_b.

    Reference: Kool, van Hoof, Welling, "Stochastic Beams and Where to Find Them", arXiv 1903.06059.
    """
    return -math.log(-math.log(open_uniform(generator)))
