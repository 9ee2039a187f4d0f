"""The section `search` of a suite: successive halving of the learning rates."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gradselect.app.recipe import Settings

LEAST_AT_THE_END = 2
"""Rates that reach the last rung, so that the choice is made at the method's own number of steps."""


class Search(Settings):
    """Successive halving: short runs of all rates, longer ones of the best, full ones of the last few.

    Attributes:
        kind: "halving". Without a search of this kind every rate of the grid runs at full length.
        shares: length of the runs of each rung, as a share of the method's own steps; the last is 1.
        keep: share of a rung's rates that go on to the next, rounded up; two at least.
    """

    kind: Literal["halving"]
    shares: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=2)] = (0.25, 1.0)
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.5

    @model_validator(mode="after")
    def check_shares(self) -> Self:
        shares = list(self.shares)
        if shares[-1] != 1 or shares != sorted(set(shares)):
            raise ValueError(
                f"shares={shares}: each rung is longer than the one before, and the last, which chooses, has all steps "
                "of the method; write e.g. shares: [0.25, 1.0]"
            )
        return self

    def num_kept(self, num_rates: int) -> int:
        """Return how many of a rung's rates go on."""
        return min(num_rates, max(LEAST_AT_THE_END, math.ceil(self.keep * num_rates)))

    def text(self) -> str:
        """Return the search as people say it."""
        lengths = ", ".join(map(percent, self.shares))
        kept = f"{percent(self.keep)} of the rates go on, two at least"
        return f"rates by successive halving: runs of {lengths} of a method's steps; {kept}"


def percent(share: float) -> str:
    """Return a share as text: "25 %"."""
    return f"{100 * share:.4g} %"
