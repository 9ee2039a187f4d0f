"""Uniform: random blocks, the baseline that any criterion has to beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from gradselect.blocks import (
    AbstractPolicy,
    Norms,
    check_fraction_or_count,
    random_stream,
    resolve_count,
    resolve_count_now,
    taking_part,
)
from gradselect.usage import check_patterns, check_whole


@final
@dataclass(eq=False, kw_only=True)
class Uniform(AbstractPolicy):
    """Select k random blocks every `every` steps; all sets of k are equally likely.

    Args:
        fraction: share of the candidate blocks that trains in a step, k = max(1, round(fraction * blocks)).
        count: k itself, instead of `fraction`.
        every: steps between two selections; the blocks stay the same in between.
        among: names or globs of the candidate blocks, e.g. `("layers",)`. None: all, and so embedding, final norm
            and head too.
        seed: seed of the draws.

    Example:
        LISA, together with `BlockOptimizer(..., always=("embedding", "norm", "head"))`:

        >>> lisa = Uniform(count=2, every=20)

    Reference: Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
    arXiv 2403.17919.
    """

    method_name = "uniform"

    fraction: float | None = None
    count: int | None = None
    every: int = 1
    among: Sequence[str] | None = None
    seed: int = 0

    selection: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_fraction_or_count(fraction=self.fraction, count=self.count)
        check_whole("every", self.every)
        check_whole("seed", self.seed, least=0)
        if self.among is not None:
            self.among = check_patterns("among", self.among)

    def start(self) -> None:
        self.candidates = taking_part(self.candidates, self.among)
        resolve_count(num_blocks=len(self.candidates), fraction=self.fraction, count=self.count)
        self.selection = []

    def propose(self, step: int) -> tuple[str, ...]:
        if step % self.every and (kept := self.still_among(self.selection)) is not None:
            return kept
        generator = random_stream(seed=self.seed, step=step // self.every, purpose="uniform")
        count = resolve_count_now(num_blocks=len(self.candidates), fraction=self.fraction, count=self.count)
        positions = generator.sample(range(len(self.names)), count)
        return tuple(self.names[position] for position in sorted(positions))

    def commit(self, step: int, selected: Sequence[str], norms: Norms) -> None:
        if step % self.every == 0 or self.still_among(self.selection) is None:
            self.selection = list(selected)

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state({"selection": [], **state})  # older checkpoints have none
