"""Cyclic: block coordinate descent, one block after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

from gradselect.blocks import AbstractPolicy, Norms, random_stream, resolve_count, taking_part
from gradselect.usage import check_one_of, check_patterns, check_whole


@final
@dataclass(eq=False, kw_only=True)
class Cyclic(AbstractPolicy):
    """Select every block once per round: `count` blocks per turn, `every` steps per turn.

    If `count` does not divide the number of blocks, the last turn of a round trains the remainder.

    Args:
        every: steps per turn; the blocks stay the same in between.
        order: "random" permutes anew each round, "ascending" is model order, "descending" starts at the head.
        count: blocks per turn.
        among: names or globs of the candidate blocks, e.g. `("layers",)`. None: all, and so embedding, final norm
            and head too.
        seed: seed of the permutations.

    Example:
        BAdam, together with `BlockOptimizer(..., residency=Drop())`:

        >>> badam = Cyclic(every=50)

    Reference: Luo, Yu, Li, "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models",
    arXiv 2404.02827.
    """

    every: int = 50
    order: Literal["random", "ascending", "descending"] = "random"
    count: int = 1
    among: Sequence[str] | None = None
    seed: int = 0

    selection: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_whole("every", self.every)
        check_one_of("order", self.order, ("random", "ascending", "descending"))
        check_whole("count", self.count)
        check_whole("seed", self.seed, least=0)
        if self.among is not None:
            self.among = check_patterns("among", self.among)

    def start(self) -> None:
        self.candidates = taking_part(self.candidates, self.among)
        resolve_count(num_blocks=len(self.candidates), fraction=None, count=self.count)
        self.selection = []

    def propose(self, step: int) -> tuple[str, ...]:
        if step % self.every and (kept := self.still_among(self.selection)) is not None:
            return kept
        round_number, turn = divmod(step // self.every, self._num_turns())
        positions = self._arrange(round_number)[turn * self.count : (turn + 1) * self.count]
        return tuple(self.names[position] for position in sorted(positions))

    def commit(self, step: int, selected: Sequence[str], norms: Norms) -> None:
        if step % self.every == 0 or self.still_among(self.selection) is None:
            self.selection = list(selected)

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state({"selection": [], **state})  # older checkpoints have none

    @property
    def coverage_steps(self) -> int:
        """Largest number of steps in which every block trains once.

        A random order may visit a block first in one round and last in the next: twice the turns lie between.
        """
        turns_between = self._num_turns() - 1
        return (2 if self.order == "random" else 1) * turns_between * self.every + 1

    def _num_turns(self) -> int:
        return math.ceil(len(self.candidates) / self.count)

    def _arrange(self, round_number: int) -> list[int]:
        positions = list(range(len(self.candidates)))
        if self.order == "random":
            random_stream(seed=self.seed, step=round_number, purpose="cyclic").shuffle(positions)
        return positions[::-1] if self.order == "descending" else positions
