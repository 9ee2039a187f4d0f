"""What a policy may select: found by asking it, for many steps, as an optimizer would."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from gradselect.blocks import AbstractPolicy

MOST_STEPS, ENOUGH_STEPS, ENOUGH_SELECTIONS = 2000, 240, 64
"""A policy is asked for so many steps at most: for as many as it takes to see that it changes its selection, and, where
selections differ in size, to see many of them."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The selections of a policy.

    Args:
        candidates: blocks that it may choose from.
        explored: how many blocks each step keeps that looks at all gradients; empty without such steps.
        proposed: the different selections that were named before their step.
    """

    candidates: tuple[str, ...]
    explored: tuple[int, ...]
    proposed: tuple[tuple[str, ...], ...]

    @property
    def count(self) -> int | None:
        """How many blocks every selection has, where that never differs and any blocks may be meant."""
        sizes = {len(selection) for selection in self.proposed}
        return sizes.pop() if len(sizes) == 1 and len(set(self.proposed)) > 1 else None

    @property
    def is_fixed(self) -> bool:
        """Whether all selections are the same."""
        return not self.explored and len(set(self.proposed)) <= 1

    @property
    def reached(self) -> tuple[str, ...]:
        """Blocks that train sooner or later."""
        if self.explored or self.count is not None:
            return self.candidates
        return tuple(name for name in self.candidates if any(name in selection for selection in self.proposed))


def ask(policy: AbstractPolicy) -> Choices:
    """The choices of a bound policy over its first steps, with gradients that are all alike.

    The policy is asked and told as `BlockOptimizer` does; it is used up by this.
    """
    policy.fill_explore_steps(ENOUGH_STEPS // 4)
    explored: set[int] = set()
    proposed: dict[tuple[str, ...], None] = {}
    norms = dict.fromkeys(policy.names, 1.0)
    for step in range(MOST_STEPS):
        selection = policy.propose(step)
        if selection is None:
            explored.add(policy.keep_at(step))
            policy.commit(step, policy.decide(step, norms), norms)
        else:
            proposed[tuple(selection)] = None
            policy.commit(step, selection, dict.fromkeys(selection, 1.0))
        is_regular = len(proposed) > 1 and len({len(each) for each in proposed}) == 1
        if len(proposed) == ENOUGH_SELECTIONS or (step >= ENOUGH_STEPS and is_regular):
            break
    return Choices(candidates=policy.names, explored=tuple(sorted(explored)), proposed=tuple(proposed))


def worst(choices: Choices, sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Selections that no other exceeds: in the depth of the backward pass, or in what they hold.

    Of policies that always choose equally many: the lowest blocks, and the lowest with the largest of the others. Of
    any other: all that were seen.
    """
    count = choices.count
    if count is None:
        return list(choices.proposed)
    by_size = sorted(choices.candidates, key=lambda name: sizes[name], reverse=True)
    lowest = choices.candidates[0]
    beside = [name for name in by_size if name != lowest][: count - 1]
    return [choices.candidates[:count], (lowest, *beside), tuple(by_size[:count])]


def mean_depth(choices: Choices, visited: Mapping[str, float]) -> float:
    r"""Mean share of the layers that the backward pass of a proposed step visits.

    With k of n blocks chosen, each set as likely as any other, and v_j the share that is visited if block j is the
    lowest one: sum_j v_j P(lowest = j), P(lowest >= j) = C(n - j, k) / C(n, k). Of other policies the mean over all
    different selections that were seen.

    Args:
        choices: of the policy.
        visited: the share for each block as the lowest.
    """
    count = choices.count
    if count is None:
        return _mean([max((visited[name] for name in selection), default=0.0) for selection in choices.proposed])
    number, total = len(choices.candidates), math.comb(len(choices.candidates), count)
    return sum(
        visited[name] * (math.comb(number - place, count) - math.comb(number - place - 1, count)) / total
        for place, name in enumerate(choices.candidates)
    )


def mean_elements(choices: Choices, sizes: Mapping[str, int]) -> float:
    """Mean number of weights that a proposed step trains, in the same sense."""
    if choices.count is None:
        return _mean([_sum(selection, sizes) for selection in choices.proposed])
    return choices.count / len(choices.candidates) * _sum(choices.candidates, sizes)


def _sum(names: Collection[str], sizes: Mapping[str, int]) -> float:
    return float(sum(sizes[name] for name in names))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
