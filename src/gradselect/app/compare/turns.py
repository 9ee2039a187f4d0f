"""Turns of a calibration, and the ratios of step costs that they show."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from gradselect.app.recipe import Recipe, Settings
from gradselect.app.results import KindCost

WARM_UP = 2
"""First steps of a turn, which are not counted: they allocate memory and fill caches."""

EXPLORE_SHARE = 3 / 11
"""Share of the measured steps of a turn that explore, for a method that has such steps. The default leaves 8 others: a
policy with a dearer step among 2, 4 or 8 is seen in its proportion."""

MOST_TIMES = 2.5
"""A step counts at most this many times the median of its kind. No selection costs that much more than another one of
its method, but another process on the machine easily does."""

NOISY = 1 / 3
"""Spread of a method's ratios above which its rounds are repeated."""


TURN_OF = "turn of    "
"""Start of a line in the log of a calibration; the method follows."""


class Turn(Settings):
    """Measured steps of one method in one round.

    Attributes:
        method: name of the method.
        number: number of the round.
        kinds: kind of each step.
        costs: seconds or FLOPs of each step.
        bytes: peak of what `counted` names.
        counted: name of the counted bytes.
        epoch_steps: optimizer steps of one pass over the data.
        block_names: names and aliases of the blocks, for a method that selects blocks.
        error: why the method could not be measured.
    """

    method: str
    number: int
    kinds: tuple[str, ...] = ()
    costs: tuple[float, ...] = ()
    bytes: int = 0
    counted: str = ""
    epoch_steps: int = 1
    block_names: tuple[str, ...] = ()
    error: str = ""


class TurnsJob(Settings):
    """Rounds to measure. As JSON it is the argument of `python -m gradselect.app.compare.turns_worker`.

    Attributes:
        recipes: recipe of each method, the reference first.
        first: number of the first round.
        rounds: number of rounds.
        steps: measured steps of a turn.
        count_flops: count FLOPs instead of seconds.
        result: file to write, a `Turns`.
    """

    recipes: dict[str, Recipe]
    first: int
    rounds: int
    steps: int
    count_flops: bool = False
    result: Path


class Turns(Settings):
    """Turns of some rounds, as a file."""

    turns: tuple[Turn, ...]


def without_bursts(turn: Turn) -> tuple[float, ...]:
    """Return the costs of the turn, each at most `MOST_TIMES` the median of its kind."""
    medians = {kind: statistics.median(_of_kind(turn, kind)) for kind in set(turn.kinds)}
    return tuple(min(cost, MOST_TIMES * medians[kind]) for kind, cost in zip(turn.kinds, turn.costs, strict=True))


def mean_cost(turn: Turn) -> float:
    """Mean cost of a step of the turn."""
    return statistics.fmean(without_bursts(turn))


def ratios(turn: Turn, reference: Turn) -> dict[str, float]:
    """Return the ratio of the costs of each kind of step to those of the reference in the same round.

    Steps are compared with the reference's steps on the same batches, unless those are of several kinds themselves.
    """
    own, other = without_bursts(turn), without_bursts(reference)
    if len(set(reference.kinds)) > 1:
        other = (statistics.fmean(other),) * len(own)
    found = {}
    for kind in dict.fromkeys(turn.kinds):
        places = [place for place, one in enumerate(turn.kinds) if one == kind]
        found[kind] = sum(own[place] for place in places) / sum(other[place] for place in places)
    return found


def kind_costs(turns: Sequence[Turn], references: Mapping[int, Turn]) -> dict[str, KindCost]:
    """Return the cost of each kind of step of one method: the medians of the ratios over its rounds."""
    rounds: dict[str, list[float]] = {}
    for turn in turns:
        for kind, ratio in ratios(turn, references[turn.number]).items():
            rounds.setdefault(kind, []).append(ratio)
    return {kind: KindCost(ratio=statistics.median(found), rounds=found) for kind, found in rounds.items()}


def spread(costs: Mapping[str, KindCost], shares: Mapping[str, float]) -> float:
    """Return (largest - smallest) / median of the rounds; of several kinds the mean, weighted by their shares."""
    return sum(share * _range(costs[kind].rounds) for kind, share in shares.items() if kind in costs)


def _range(rounds: Sequence[float]) -> float:
    return (max(rounds) - min(rounds)) / statistics.median(rounds) if rounds else 0.0


def _of_kind(turn: Turn, kind: str) -> list[float]:
    return [cost for one, cost in zip(turn.kinds, turn.costs, strict=True) if one == kind]
