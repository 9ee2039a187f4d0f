"""Selections that a policy makes, found by running it as an optimizer would."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from gradselect.blocks import AbstractPolicy, resolve_names
from gradselect.core import Block

MAX_STEPS, ENOUGH_STEPS, ENOUGH_SELECTIONS = 2000, 240, 64
"""Limits of a survey. It ends after `ENOUGH_STEPS` if the selection changes and its size does not, after
`ENOUGH_SELECTIONS` different selections, or after `MAX_STEPS`."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Selections of a policy.

    Args:
        candidates: blocks that it may select, in model order.
        explored: numbers of blocks that steps keep which look at all gradients; empty without such steps.
        proposed: different selections that were known before their step.
    """

    candidates: tuple[str, ...]
    explored: tuple[int, ...]
    proposed: tuple[tuple[str, ...], ...]

    @property
    def count(self) -> int | None:
        """Number of blocks in a selection; None if it varies or the selection never changes."""
        sizes = {len(selection) for selection in self.proposed}
        return sizes.pop() if len(sizes) == 1 and len(set(self.proposed)) > 1 else None

    @property
    def is_fixed(self) -> bool:
        """True if all selections are the same."""
        return not self.explored and len(set(self.proposed)) <= 1

    @property
    def reached(self) -> tuple[str, ...]:
        """Blocks that train sooner or later."""
        if self.explored or self.count is not None:
            return self.candidates
        return tuple(name for name in self.candidates if any(name in selection for selection in self.proposed))


def survey_policy(policy: AbstractPolicy, blocks: Sequence[Block], always: Collection[str]) -> Survey:
    """Survey the policy on these blocks, without the blocks that always train.

    Raises:
        UsageError: the policy does not fit the blocks.
    """
    fixed = resolve_names(blocks, tuple(always))
    return survey(policy.bind([block for block in blocks if block.name not in fixed]))


def survey(policy: AbstractPolicy) -> Survey:
    """Run a bound policy over its first steps with equal gradient norms. This uses the policy up."""
    policy.fill_explore_steps(ENOUGH_STEPS // 4)
    explored: set[int] = set()
    proposed: dict[tuple[str, ...], None] = {}
    norms = dict.fromkeys(policy.names, 1.0)
    for step in range(MAX_STEPS):
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
    return Survey(candidates=policy.names, explored=tuple(sorted(explored)), proposed=tuple(proposed))


def worst(found: Survey, sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Return selections that no other exceeds, in the depth of the backward pass or in bytes.

    For a constant number of blocks: the lowest blocks, the lowest one with the largest others, and the largest. Else
    all selections of the survey.
    """
    count = found.count
    if count is None:
        return list(found.proposed)
    by_size = sorted(found.candidates, key=lambda name: sizes[name], reverse=True)
    lowest = found.candidates[0]
    beside = [name for name in by_size if name != lowest][: count - 1]
    return [found.candidates[:count], (lowest, *beside), tuple(by_size[:count])]


def mean_depth(found: Survey, visited: Mapping[str, float]) -> float:
    r"""Return the mean share of layers that the backward pass of a proposed step visits.

    With k of n blocks, all sets equally likely, and v_j the share that is visited if block j is the lowest:
    sum_j v_j P(lowest = j), where P(lowest >= j) = C(n - j, k) / C(n, k). If the number of blocks varies: the mean over
    the selections of the survey.

    Args:
        found: the survey.
        visited: the share by lowest block.
    """
    count = found.count
    if count is None:
        return _mean([max((visited[name] for name in selection), default=0.0) for selection in found.proposed])
    number, total = len(found.candidates), math.comb(len(found.candidates), count)
    return sum(
        visited[name] * (math.comb(number - place, count) - math.comb(number - place - 1, count)) / total
        for place, name in enumerate(found.candidates)
    )


def mean_entries(found: Survey, sizes: Mapping[str, int]) -> float:
    """Return the mean number of entries that a proposed step trains, under the same assumption."""
    if found.count is None:
        return _mean([_sum(selection, sizes) for selection in found.proposed])
    return found.count / len(found.candidates) * _sum(found.candidates, sizes)


def _sum(names: Collection[str], sizes: Mapping[str, int]) -> float:
    return float(sum(sizes[name] for name in names))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
