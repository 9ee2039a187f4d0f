"""Stratified: so many blocks of each layer, or of each category of a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from gradselect.blocks import AbstractPolicy, Norms, check_fraction_or_count, random_stream, taking_part, tells
from gradselect.usage import UsageError, check_is, check_one_of, check_patterns, check_whole

from .strata import By, Strata, check_strata, strata_of


@final
@dataclass(eq=False, kw_only=True)
class Stratified(AbstractPolicy):
    """Select a share of each stratum: of the blocks of each layer, or of each category within a layer.

    The strata come from the names of the blocks, as `partition` gives them:

        by="layer"     the slices of a layer ("layer.3.columns.0", ...), or its matrices; its 1-D tensors
        by="category"  the slices of a layer; its matrices by the module that holds them ("layer.3.self_attn.*",
                       "layer.3.mlp.*"); over all layers, where a layer has one block of the kind ("layer.*.vectors")

    A block outside the layers is a stratum of its own, and a draw takes at least one block of each stratum. So the
    embedding, the final norm and the head train at every step unless `among` leaves them out.

    With slices, each layer trains the same share at each step: the weight gradients cost that share, and the backward
    pass goes through all layers.

    Args:
        by: kind of strata.
        fraction: share of each stratum. Where fraction * blocks is not whole, strata of the same size round up in turn.
        count: number of blocks of each stratum, instead of `fraction`; a smaller stratum trains whole.
        order: "random" draws anew every `every` steps. "rotate" takes the blocks of a stratum one after the other.
            "fixed" draws once. "norm" takes those of largest gradient norm, from a step that looks at all gradients.
        every: steps between two selections; the blocks stay the same in between.
        stagger: with "rotate", each stratum is one turn ahead of the one before it. False: all stand at the same place.
        among: names or globs of the candidate blocks. None: all, and so embedding, final norm and head too.
            `("layer.*.*.*",)` names the slices of layers, and the matrices of modules in them, without 1-D tensors. A
            matrix that a layer holds itself, as OPT's "layer.3.fc1", needs `"layer.*.fc?"` beside it; layers of T5 and
            BART have the name of their stack before them, `"*layer.*.*.*"`.
        seed: seed of the draws.

    Example:
        One of eight ranges of columns of each layer, another one at each step:

        >>> policy = Stratified(count=1, order="rotate", among=("layer.*.*.*",))

    Reference: Hui et al., "HFT: Half Fine-Tuning for Large Language Models", arXiv 2404.18466, for the draw by
    category; Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", arXiv 2503.01905, for a draw
    that stays.
    """

    method_name = "stratified"

    by: By = "layer"
    fraction: float | None = None
    count: int | None = None
    order: Literal["random", "rotate", "fixed", "norm"] = "random"
    every: int = 1
    stagger: bool = True
    among: Sequence[str] | None = None
    seed: int = 0

    selection: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_one_of("by", self.by, ("layer", "category"))
        check_fraction_or_count(fraction=self.fraction, count=self.count)
        check_one_of("order", self.order, ("random", "rotate", "fixed", "norm"))
        check_whole("every", self.every)
        check_is(self.stagger, bool, name="stagger", example="stagger=False")
        check_whole("seed", self.seed, least=0)
        if self.among is not None:
            self.among = check_patterns("among", self.among)
        if self.order == "fixed" and self.every != 1:
            raise UsageError(f'every={self.every} with order="fixed", which draws once; leave one of them out')
        if self.order != "rotate" and not self.stagger:
            raise UsageError(f'stagger=False with order="{self.order}"; leave it out, or write order="rotate"')

    def start(self) -> None:
        self.candidates = taking_part(self.candidates, self.among)
        check_strata(self.strata, by=self.by)
        self.selection = []

    @property
    def strata(self) -> Strata:
        """Strata of the present candidates."""
        return strata_of(self.names, self.by, self.fraction, self.count)

    def expected_explore_steps(self, num_steps: int) -> float:
        return -(-num_steps // self.every) if self.order == "norm" else 0.0

    def propose(self, step: int) -> tuple[str, ...] | None:
        if step % self.every and (kept := self.still_among(self.selection)) is not None:
            return kept
        if self.order == "norm":
            return None
        keys = (
            self._turns(step) if self.order == "rotate" else draw_keys(self.num_elements, self._draw(step), self.seed)
        )
        return self.best(step, keys)

    def stratum(self, block: str) -> str:
        return self.strata.of[block]

    def keep_in(self, step: int, stratum: str) -> int:
        if self.order == "rotate" and not self.stagger:
            return self.strata.taken(stratum, self._draw(step))[1]
        return self.strata.num_taken(stratum, self._draw(step))

    def keep_at(self, step: int) -> int:
        return sum(self.keep_in(step, stratum) for stratum in self.strata.members)

    def score(self, step: int, block: str, norm: float) -> float:
        return norm if math.isfinite(norm) else -math.inf

    def commit(self, step: int, selected: Sequence[str], norms: Norms) -> None:
        if step % self.every == 0 or self.still_among(self.selection) is None:
            self.selection = list(selected) if tells(norms) else []  # none: the next step selects again

    @property
    def coverage_steps(self) -> int | None:
        if self.order != "rotate":
            return None
        return (self.strata.num_draws() - 1) * self.every + 1

    def _draw(self, step: int) -> int:
        return 0 if self.order == "fixed" else step // self.every

    def _turns(self, step: int) -> dict[str, float]:
        """Return a key per block: larger, the sooner its turn comes."""
        strata, keys = self.strata, {}
        for stratum, names in strata.members.items():
            ahead = strata.places[stratum] if self.stagger else 0
            start, _ = strata.taken(stratum, self._draw(step) + ahead)
            keys |= {name: -float((place - start) % len(names)) for place, name in enumerate(names)}
        return keys


def draw_keys(names: Mapping[str, int], draw: int, seed: int) -> dict[str, float]:
    """Return a random key per block. The largest of a stratum are its draw, even after other blocks dropped out."""
    generator = random_stream(seed=seed, step=draw, purpose="stratified")
    return {name: generator.random() for name in names}
