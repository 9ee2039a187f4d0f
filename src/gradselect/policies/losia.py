"""LoSiA: slices of each layer selected by importance, one layer after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from gradselect.blocks import (
    AbstractPolicy,
    Norms,
    check_fraction_or_count,
    largest,
    random_stream,
    taking_part,
)
from gradselect.usage import UsageError, check_one_of, check_patterns, check_positive, check_whole

from .strata import By, Strata, check_strata, strata_of


@final
@dataclass(eq=False, kw_only=True)
class LoSiA(AbstractPolicy):
    """Train the most important slices of each layer, and look for better ones in one layer at a time.

        slot s = steps s T, ..., (s + 1) T - 1 belongs to layer s mod L; at each of its steps, for each slice b of it,
        q_b = sum |w g| over the slice
        I_b <- ema I_b + (1 - ema) q_b
        U_b <- ema U_b + (1 - ema) |q_b - I_b|
        at the end of the slot the layer's slices of largest I_b U_b are selected; I and U start anew

    At first the slices are random. In its slot a layer computes the gradients of all its slices and updates the
    selected ones; the other layers train their selected slices as ever. So a step costs the share of each layer, and
    the rest of one layer.

    From the paper and its code: importance, uncertainty and their product, ema = 0.85, the turns of the layers, the
    reset of I and U, moments cleared where the selection changes (`residency=Drop()`), the learning rate that warms up
    again there over T steps (`borders=Borders(rewarm_steps=T)`).

    Different here: a slice is a range of columns of every linear of a layer, where the paper selects rows and columns
    one by one for each matrix, by a greedy search. I and U are kept for each slice, where the paper has them for each
    entry. q leaves out the paper's second-order term, as the option "param_first" of its code does; with it,
    q = |w g - (w g)^2 / 2|. A slice that stays selected keeps its moments and its rate.

    In the authors' scripts embedding, norms and head train whole beside the subnets. So they do here with by="layer"
    and among=None. The recipe `losia` leaves them out unless `among: null` or `always` says otherwise.

    Args:
        by: kind of strata, as `gradselect.Stratified` has them: with "category" slots go by category.
        fraction: share of the slices of each layer.
        count: number of slices of each layer, instead of `fraction`.
        every: T, steps of a slot. The scripts of the paper have 50 to 150.
        ema: weight of the old average, in (0, 1).
        among: names or globs of the candidate blocks. None: all; then blocks outside the layers (embedding, final norm,
            head) train at every step, and so do the 1-D tensors of layers with by="layer". With "category" these have a
            slot too.
        seed: seed of the first selection.

    Example:
        >>> policy = LoSiA(count=1, every=50, among=("layer.*.*.*",))

    Reference: Wang, Qi, Xu, "LoSiA: Efficient High-Rank Fine-Tuning via Subnet Localization and Optimization", arXiv
    2507.04487.
    """

    measure = "taylor"

    by: By = "layer"
    fraction: float | None = None
    count: int | None = None
    every: int = 50
    ema: float = 0.85
    among: Sequence[str] | None = None
    seed: int = 0

    importance: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    uncertainty: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    selection: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_one_of("by", self.by, ("layer", "category"))
        check_fraction_or_count(fraction=self.fraction, count=self.count)
        check_whole("every", self.every)
        check_positive("ema", self.ema, at_most=1, example=0.85)
        check_whole("seed", self.seed, least=0)
        if self.ema == 1:
            raise UsageError("ema=1 would never learn an importance; write ema=0.85")
        if self.among is not None:
            self.among = check_patterns("among", self.among)

    def start(self) -> None:
        self.candidates = taking_part(self.candidates, self.among)
        check_strata(self.strata, by=self.by)
        self.importance, self.uncertainty = {}, {}
        self.selection = []
        self.selection = list(self.propose(0))

    @property
    def strata(self) -> Strata:
        """Strata of the present candidates."""
        return strata_of(self.names, self.by, self.fraction, self.count)

    def propose(self, step: int) -> tuple[str, ...]:
        # Blocks that dropped out are replaced by random ones.
        generator = random_stream(seed=self.seed, step=0, purpose="losia")
        keys = {name: generator.random() + (name in self.selection) for name in self.num_elements}
        return self.best(step, keys)

    def stratum(self, block: str) -> str:
        return self.strata.of[block]

    def keep_in(self, step: int, stratum: str) -> int:
        return self.strata.num_taken(stratum, 0)

    def observed(self, step: int) -> tuple[str, ...]:
        contested = self.strata.contested()
        return self.strata.members[contested[step // self.every % len(contested)]] if contested else ()

    def commit(self, step: int, selected: Sequence[str], norms: Norms) -> None:
        observed = self.observed(step)
        for name in observed:
            self._learn(name, norms.get(name, math.nan))
        if step % self.every == self.every - 1:
            self._select_among(observed)

    def _learn(self, block: str, q: float) -> None:
        if math.isfinite(q):
            weight = 1 - self.ema
            average = self.ema * self.importance.get(block, 0.0) + weight * q
            self.uncertainty[block] = self.ema * self.uncertainty.get(block, 0.0) + weight * abs(q - average)
            self.importance[block] = average

    def _select_among(self, observed: Sequence[str]) -> None:
        """Select anew in the stratum whose slot ends, and forget what was learned in it."""
        scores = {name: self.importance.get(name, 0.0) * self.uncertainty.get(name, 0.0) for name in observed}
        if any(scores.values()):
            best = largest(observed, scores, self.keep_in(0, self.stratum(observed[0])))
            stay = {name for name in self.selection if name not in observed}
            self.selection = [name for name in self.num_elements if name in stay or name in best]
        self.importance, self.uncertainty = {}, {}
