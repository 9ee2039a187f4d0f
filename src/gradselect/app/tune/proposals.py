"""Proposals: the values of the next trial, by TPE or by CMA-ES."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import count
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from gradselect import UsageError

from .ranges import Number, SearchRange
from .study import STARTUP_TRIALS, ended

Sampler = Literal["tpe", "cmaes"]

DRAW = "draw"
"""Attribute of a trial: number of its draw, counted from 0. An interrupted trial leaves its draw to another."""

GENERATION = "generation"
"""Attribute of a trial: the generation of CMA-ES that it was drawn from."""

FIRST_DEVIATION = 1 / 6
"""Standard deviation of the first generation, as a share of each range: three of it reach from the middle to an end."""


def check_sampler(name: str) -> Sampler:
    """Return the name of a sampler whose package is installed.

    Raises:
        UsageError: there is none, or it is not.
    """
    if name == "tpe":
        return "tpe"
    if name != "cmaes":
        raise UsageError(f"--sampler {name!r}: there is no such sampler; write tpe or cmaes")
    if find_spec("cmaes") is None:
        raise UsageError("--sampler cmaes needs the package cmaes; run: pip install cmaes")
    return "cmaes"


def next_trial(
    study: optuna.Study,
    ranges: Sequence[SearchRange],
    *,
    own: Mapping[str, Any],
    seed: int,
    sampler: Sampler,
    alive: Sequence[FrozenTrial] = (),
) -> optuna.Trial:
    """Return the next trial. The first has the recipe's `own` values if they are in range; then the sampler proposes.

    The seed of a draw depends on its number alone. An interrupted trial gives its number back, so in one process an
    interrupted search proposes the same values; trials that run at the same time have different numbers.

    Bergstra, Bardenet, Bengio, Kégl, "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011; Hansen, "The CMA
    Evolution Strategy: A Tutorial", arXiv 1604.00772.

    Args:
        study: the trials so far.
        ranges: of the values.
        own: value of the recipe for each range.
        seed: of the search.
        sampler: which one.
        alive: trials that other processes carry out.
    """
    number = _free_draw(ended(study), alive)
    seed_of_draw = random.Random(f"gradselect/tune/{seed}/{number}").randrange(2**32)
    is_queued = bool(study.get_trials(states=(TrialState.WAITING,)))
    if number == 0 and not is_queued and all(searched.has(own[searched.key]) for searched in ranges):
        study.enqueue_trial(dict(own))
        is_queued = True
    cma = CmaEsSampler(ranges, own=own, seed=seed_of_draw) if sampler == "cmaes" else None
    study.sampler = cma or optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed_of_draw)
    trial = study.ask({searched.key: _distribution(searched) for searched in ranges})
    trial.set_user_attr(DRAW, number)
    if cma is not None and not is_queued:
        trial.set_user_attr(GENERATION, cma.generation)
    return trial


def _free_draw(done: Sequence[FrozenTrial], alive: Sequence[FrozenTrial]) -> int:
    """Return the smallest number of a draw that no trial has. Trials of older versions have none: they are in order."""
    taken = {trial.user_attrs.get(DRAW, place) for place, trial in enumerate(done)}
    taken |= {trial.user_attrs.get(DRAW) for trial in alive}
    return next(number for number in count() if number not in taken)


class CmaEsSampler(optuna.samplers.BaseSampler):
    """Proposes values by CMA-ES, from the trials alone: it keeps no state of its own in the study.

    The distribution starts around the recipe's own values and learns from whole generations. A generation is the first
    trials that have ended of those drawn from it; trials that several processes have drawn beyond that do not count.
    Pruned and stopped trials rank behind all finished ones. Trials that could not fit the memory are left out.

    Args:
        ranges: of the values. Integers are drawn as numbers and rounded.
        own: value of the recipe for each range.
        seed: seed of this draw.

    Attributes:
        generation: number of the generation that was last drawn from.
    """

    def __init__(self, ranges: Sequence[SearchRange], *, own: Mapping[str, Any], seed: int) -> None:
        self._ranges, self._own, self._seed = ranges, own, seed
        self.generation = 0

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {searched.key: _distribution(searched) for searched in self._ranges}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        import cmaes  # pyright: ignore[reportMissingImports]
        import numpy as np

        middle = [
            _place(searched, self._own[searched.key]) if searched.has(self._own[searched.key]) else 0.5
            for searched in self._ranges
        ]
        optimizer = cmaes.CMA(
            mean=np.array(middle),
            sigma=FIRST_DEVIATION,
            bounds=np.array([[0.0, 1.0]] * len(middle)),
            seed=self._seed,
        )
        drawn = [
            trial for trial in ended(study) if GENERATION in trial.user_attrs and trial.user_attrs["end"] != "vetoed"
        ]
        drawn.sort(key=lambda trial: (trial.datetime_complete, trial.number))
        while len(known := self._of_generation(drawn, optimizer.generation)) >= optimizer.population_size:
            known = sorted(known[: optimizer.population_size], key=_rank)
            places = [[_place(searched, trial.params[searched.key]) for searched in self._ranges] for trial in known]
            optimizer.tell([(np.array(place), float(rank)) for rank, place in enumerate(places)])
        self.generation = optimizer.generation
        proposal = optimizer.ask().tolist()
        return {searched.key: _value(searched, place) for searched, place in zip(self._ranges, proposal, strict=True)}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"{param_name} is in the search space of every trial")

    def _of_generation(self, trials: Sequence[FrozenTrial], generation: int) -> list[FrozenTrial]:
        return [trial for trial in trials if trial.user_attrs[GENERATION] == generation]


def _rank(trial: FrozenTrial) -> tuple[bool, float, int]:
    """Order finished trials by their loss, before all others by their last loss. CMA-ES reads nothing but the order."""
    step = trial.last_step
    last = math.inf if step is None else trial.intermediate_values[step]
    loss = trial.value if trial.state == TrialState.COMPLETE else None
    return loss is None, last if loss is None else loss, trial.number


def _ends(searched: SearchRange) -> tuple[float, float]:
    """Return the ends of a range, for integers with half a step at each, so that all are equally likely."""
    half = 0.5 if searched.whole else 0.0
    low, high = searched.low - half, searched.high + half
    return (math.log(low), math.log(high)) if searched.log else (low, high)


def _place(searched: SearchRange, value: Number) -> float:
    low, high = _ends(searched)
    return ((math.log(value) if searched.log else value) - low) / (high - low)


def _value(searched: SearchRange, place: float) -> Number:
    low, high = _ends(searched)
    at = low + place * (high - low)
    value = math.exp(at) if searched.log else at
    return min(searched.high, max(searched.low, round(value) if searched.whole else value))


def _distribution(searched: SearchRange) -> BaseDistribution:
    if searched.whole:
        return IntDistribution(int(searched.low), int(searched.high), log=searched.log)
    return FloatDistribution(searched.low, searched.high, log=searched.log)
