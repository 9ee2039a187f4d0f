"""Selections that a policy makes, found by running it as an optimizer would."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from gradselect.blocks import AbstractPolicy, StepCost, random_stream, resolve_names
from gradselect.core import Block

MAX_STEPS, ENOUGH_STEPS, ENOUGH_SELECTIONS = 2000, 240, 64
"""Limits of a survey. It ends after `ENOUGH_STEPS` if the selection changes and its size does not, after
`ENOUGH_SELECTIONS` different selections, or after `MAX_STEPS`."""

ENOUGH_DRAWS = 400
"""Proposed steps that are counted of a policy whose draws are not even."""


LATER_STEPS = (10_000, 70_000, 99_991, 999_983)
"""Steps that tell a selection which changes seldom from one that never does. Multiples of most periods, and others: a
policy may change at multiples only, and a rotation may stand where it began at all of those."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Selections of a policy.

    Args:
        candidates: blocks that it may select, in model order.
        explored: numbers of blocks that steps keep which look at all gradients; empty without such steps.
        times: number of steps that took each of the different selections that were known before their step; 0 for one
            that only a step beyond the survey takes.
        beside: blocks that a step looks at without updating them, by selection; selections without any are left out.
        is_even: True if all sets of blocks of one size are about equally likely.
        strata: stratum of each candidate, of a policy with strata.
    """

    candidates: tuple[str, ...]
    explored: tuple[int, ...]
    times: Mapping[tuple[str, ...], int]
    beside: Mapping[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    is_even: bool = True
    strata: Mapping[str, str] = field(default_factory=dict)

    @property
    def proposed(self) -> tuple[tuple[str, ...], ...]:
        """Different selections that were known before their step."""
        return tuple(self.times)

    @property
    def count(self) -> int | None:
        """Number of blocks in a selection; None if it varies or the selection never changes."""
        sizes = {len(selection) for selection in self.proposed}
        return sizes.pop() if len(sizes) == 1 and len(set(self.proposed)) > 1 else None

    @property
    def is_fixed(self) -> bool:
        """True if all selections are the same."""
        return not self.explored and not self.beside and len(set(self.proposed)) <= 1

    @property
    def reached(self) -> tuple[str, ...]:
        """Blocks that train sooner or later: all candidates, if the selection changes at all."""
        if self.explored or self.beside or len(self.proposed) > 1:
            return self.candidates
        return tuple(name for name in self.candidates if any(name in selection for selection in self.proposed))


def survey_policy(
    policy: AbstractPolicy, blocks: Sequence[Block], always: Collection[str], *, cost: StepCost
) -> Survey:
    """Survey the policy on these blocks, without the blocks that always train.

    Raises:
        UsageError: the policy does not fit the blocks.
    """
    fixed = resolve_names(blocks, tuple(always))
    return survey(policy.bind([block for block in blocks if block.name not in fixed], cost=cost))


def survey(policy: AbstractPolicy) -> Survey:
    """Run a bound policy over its first steps with equal gradient norms. This uses the policy up.

    A policy whose draws are not even gets norms with noise instead, so that no block is favoured for its place; for a
    measure that is a sum over entries they are in proportion to the entries.
    """
    policy.fill_explore_steps(ENOUGH_STEPS // 4)
    beginning = policy.state()
    explored: set[int] = set()
    proposed: Counter[tuple[str, ...]] = Counter()
    beside: dict[tuple[str, ...], tuple[str, ...]] = {}
    strata = {name: stratum for name in policy.names if (stratum := policy.stratum(name))}
    is_even = policy.draws_evenly() and not strata
    for step in range(MAX_STEPS):
        norms = _norms(policy, step)
        selection = policy.propose(step)
        if selection is None:
            explored.add(policy.keep_at(step))
            policy.commit(step, policy.decide(step, norms), norms)
        else:
            proposed[tuple(selection)] += 1
            observed = policy.observed(step)
            if left := tuple(name for name in observed if name not in selection):
                beside.setdefault(tuple(selection), left)
            policy.commit(step, selection, {name: norms[name] for name in {*selection, *observed}})
        if _is_enough(proposed, step, is_even=is_even):
            break
    if len(proposed) == 1 and not explored:
        policy.load_state(beginning)  # it would keep the selection until its period ends
        later = map(policy.propose, LATER_STEPS)
        proposed.update(dict.fromkeys((tuple(selection) for selection in later if selection is not None), 0))
    return Survey(
        candidates=policy.names,
        explored=tuple(sorted(explored)),
        times=dict(proposed),
        beside=beside,
        is_even=is_even and not beside,
        strata=strata,
    )


def _norms(policy: AbstractPolicy, step: int) -> dict[str, float]:
    is_sum = policy.measured() != "l2"
    norms = {name: float(policy.num_elements[name]) if is_sum else 1.0 for name in policy.names}
    if policy.draws_evenly():
        return norms
    generator = random_stream(seed=0, step=step, purpose="survey")
    return {name: norm * generator.uniform(0.5, 1.5) for name, norm in norms.items()}


def _is_enough(proposed: Counter[tuple[str, ...]], step: int, *, is_even: bool) -> bool:
    if not is_even:
        return proposed.total() >= ENOUGH_DRAWS
    is_regular = len(proposed) > 1 and len({len(each) for each in proposed}) == 1
    return len(proposed) == ENOUGH_SELECTIONS or (step >= ENOUGH_STEPS and is_regular)


def worst(found: Survey, sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Return selections that no other exceeds, in the depth of the backward pass or in bytes.

    For a constant number of blocks: the lowest blocks, the lowest one with the largest others, and the largest. Else
    all selections of the survey; of many, the largest and those that go deepest. With strata one more: the largest
    blocks of each, as many as a selection of the survey takes.
    """
    count = found.count
    if count is None or not found.is_even:
        places = {name: place for place, name in enumerate(found.candidates)}
        largest = sorted(found.proposed, key=lambda each: -sum(sizes[name] for name in each))
        deepest = sorted(largest, key=lambda each: min((places[name] for name in each), default=len(places)))
        half = ENOUGH_SELECTIONS // 2
        in_strata = [_largest_of_strata(found, sizes)] if found.strata and len(found.proposed) > 1 else []
        return list(dict.fromkeys([*largest[:half], *deepest[:half], *in_strata]))
    by_size = sorted(found.candidates, key=lambda name: sizes[name], reverse=True)
    lowest = found.candidates[0]
    beside = [name for name in by_size if name != lowest][: count - 1]
    return [found.candidates[:count], (lowest, *beside), tuple(by_size[:count])]


def _largest_of_strata(found: Survey, sizes: Mapping[str, int]) -> tuple[str, ...]:
    by_size = sorted(found.candidates, key=lambda name: sizes[name], reverse=True)

    def exchanged(selection: Sequence[str]) -> tuple[str, ...]:
        left, taken = Counter(map(found.strata.__getitem__, selection)), set()
        for name in by_size:
            if left[found.strata[name]]:
                left[found.strata[name]] -= 1
                taken.add(name)
        return tuple(name for name in found.candidates if name in taken)

    return max(map(exchanged, found.proposed), key=lambda each: sum(sizes[name] for name in each))


def mean_by_lowest(found: Survey, values: Mapping[str, float]) -> float:
    r"""Return the mean over proposed steps of a value that the lowest selected block decides.

    With k of n blocks, all sets equally likely, and v_j the value if block j is the lowest: sum_j v_j P(lowest = j),
    where P(lowest >= j) = C(n - j, k) / C(n, k). If the number of blocks varies, or draws are not even: the mean over
    the steps of the survey.

    Args:
        found: the survey.
        values: by lowest block; the lower the block, the larger.
    """
    count = found.count
    if count is None or not found.is_even:
        return _mean(found, lambda names: max((values[name] for name in names), default=0.0))
    number, total = len(found.candidates), math.comb(len(found.candidates), count)
    lowest_first = sorted(found.candidates, key=lambda name: values[name], reverse=True)
    return sum(
        values[name] * (math.comb(number - place, count) - math.comb(number - place - 1, count)) / total
        for place, name in enumerate(lowest_first)
    )


def mean_sum(found: Survey, values: Mapping[str, float]) -> float:
    """Return the mean over proposed steps of the sum over blocks with gradients, under the same assumption."""
    if found.count is None or not found.is_even:
        return _mean(found, lambda names: sum(values[name] for name in names))
    return found.count / len(found.candidates) * sum(values[name] for name in found.candidates)


def _mean(found: Survey, value: Callable[[Collection[str]], float]) -> float:
    """Mean over proposed steps of a value of the blocks that have gradients in it."""
    total = sum(found.times.values())
    if not total:
        return 0.0
    steps = [((*selection, *found.beside.get(selection, ())), times) for selection, times in found.times.items()]
    return sum(times * value(names) for names, times in steps) / total
