"""Steps of each method: as many as fit into the budget by the calibration."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from gradselect import UsageError
from gradselect.app.recipe import AbstractBlockMethod, Recipe
from gradselect.app.results import Calibration, MethodCalibration, RunBudget
from gradselect.usage import write_size

from .budget import Budget, with_steps
from .suite import Suite
from .turns import spread

MOST_STEPS = 10**9
"""Largest number of steps of a run."""


def allot(suite: Suite, calibration: Calibration, methods: Sequence[str]) -> Calibration:
    """Return the calibration with the steps of these methods, and why some are left out.

    Raises:
        UsageError: the budget of a method is shorter than one of its steps.
    """
    budget = suite.budget
    assert budget is not None
    run_steps = _run_steps(suite.recipe, calibration.methods[calibration.reference])
    total = _total(suite, budget, calibration, run_steps=run_steps)
    allotted = {
        name: _allot_one(suite, budget, calibration, name, total=total, run_steps=run_steps)
        if name in methods
        else known
        for name, known in calibration.methods.items()
    }
    return calibration.model_copy(
        update={
            "methods": allotted,
            "budget": total,
            "budget_text": budget.text(),
            "run_steps": run_steps,
            "memory": budget.memory,
        }
    )


def run_budget(calibration: Calibration, method: str) -> RunBudget:
    """Return the budget of a run of this method, for its result file."""
    own = calibration.methods[method]
    return RunBudget(
        text=calibration.budget_text,
        unit=calibration.unit,
        total=calibration.budget,
        steps=own.steps,
        step_cost=own.step_cost,
        ratio=own.ratio,
        spread=own.spread,
        rounds=own.num_rounds,
        reference=calibration.reference,
        machine=calibration.machine,
        memory=calibration.memory,
        bytes=own.bytes,
        counted=calibration.counted,
    )


def check_any_fits(calibration: Calibration, methods: Sequence[str]) -> None:
    """Refuse a memory that is too small for each of these methods that could be measured.

    Raises:
        UsageError: none fits; names the smallest.
    """
    measured = {name: own for name in methods if not (own := calibration.methods[name]).error}
    if measured and all(own.left_out for own in measured.values()):
        smallest = min(measured, key=lambda name: measured[name].bytes or 0)
        needed = math.ceil((measured[smallest].bytes or 0) / 2**20)
        raise UsageError(
            f"budget.memory={write_size(calibration.memory or 0)} is too small for every method: the smallest, "
            f"{smallest!r}, {measured[smallest].left_out} ({calibration.counted}); write "
            f"budget.memory={needed}MiB or more"
        )


def kind_shares(recipe: Recipe, known: MethodCalibration, *, steps: int) -> dict[str, float]:
    """Return the expected share of each kind of step in a run of `steps` steps of this recipe."""
    explored = _expected_explore_steps(recipe, known, steps=steps) / steps
    shares = {"explore": explored, "exploit": 1 - explored} if {"explore", "exploit"} & set(known.by_kind) else {}
    shares = {kind: share for kind, share in shares.items() if share > 0} or dict.fromkeys(known.by_kind, 1.0)
    measured = {kind: share for kind, share in shares.items() if kind in known.by_kind}
    # A kind that no turn has seen counts as the others.
    whole = sum(measured.values())
    return {kind: share / whole for kind, share in measured.items()} if whole else dict.fromkeys(known.by_kind, 1.0)


def _expected_explore_steps(recipe: Recipe, known: MethodCalibration, *, steps: int) -> float:
    method = recipe.method
    if not isinstance(method, AbstractBlockMethod):
        return 0.0
    policy = method.policy(seed=0, block_names=known.block_names)
    policy.fill_explore_steps(min(known.epoch_steps or steps, steps), run_steps=steps)
    return min(float(steps), policy.expected_explore_steps(steps))


def _run_steps(recipe: Recipe, reference: MethodCalibration) -> int:
    """Return the steps of a run without the budget."""
    if recipe.run.steps is not None:
        return recipe.run.steps
    return math.ceil((recipe.run.epochs or 1) * (reference.epoch_steps or 1))


def _total(suite: Suite, budget: Budget, calibration: Calibration, *, run_steps: int) -> float | None:
    """Return the cost that every run may take, in the calibration's unit; None for a budget of memory alone."""
    if budget.time_of is None:
        return budget.seconds or budget.flops
    known = calibration.methods[budget.time_of]
    return budget.share * _cost_of_run(suite, calibration, budget.time_of, known, steps=run_steps, run_steps=run_steps)


def _cost_of_run(
    suite: Suite, calibration: Calibration, name: str, known: MethodCalibration, *, steps: int, run_steps: int
) -> float:
    ratio = _mean_ratio(suite, name, known, steps=steps, run_steps=run_steps)
    return steps * ratio * calibration.reference_cost


def _mean_ratio(suite: Suite, name: str, known: MethodCalibration, *, steps: int, run_steps: int) -> float:
    recipe = _recipe(suite, name, steps=steps, run_steps=run_steps)
    shares = kind_shares(recipe, known, steps=steps)
    return sum(share * known.by_kind[kind].ratio for kind, share in shares.items())


def _recipe(suite: Suite, name: str, *, steps: int, run_steps: int) -> Recipe:
    recipe = suite.training_recipe(name, lr=1.0, seed=0, output="-")
    return with_steps(recipe, steps=steps, run_steps=run_steps)


def _allot_one(
    suite: Suite, budget: Budget, calibration: Calibration, name: str, *, total: float | None, run_steps: int
) -> MethodCalibration:
    known = calibration.methods[name]
    if known.error:
        return known
    too_large = budget.memory is not None and (known.bytes or 0) > budget.memory
    reason = f"takes {write_size(known.bytes or 0)} of {write_size(budget.memory or 0)}" if too_large else ""

    def cost(steps: int) -> float:
        return _cost_of_run(suite, calibration, name, known, steps=steps, run_steps=run_steps)

    steps = run_steps
    if total is not None:
        steps = _steps_that_fit(total, cost, first_guess=run_steps)
        if not steps and not too_large:
            raise UsageError(_too_short(budget, calibration, name, total=total, least=cost(1)))
    shares = kind_shares(_recipe(suite, name, steps=max(1, steps), run_steps=run_steps), known, steps=max(1, steps))
    ratio = sum(share * known.by_kind[kind].ratio for kind, share in shares.items())
    return known.model_copy(
        update={
            "steps": None if too_large or total is None else steps,
            "ratio": ratio,
            "step_cost": ratio * calibration.reference_cost,
            "spread": spread(known.by_kind, shares),
            "left_out": reason,
        }
    )


def _steps_that_fit(total: float, cost: Any, *, first_guess: int) -> int:
    """Return the largest number of steps whose cost is at most `total`."""
    limit = total * (1 + 1e-9)  # the reference gets its own steps back, whatever rounding does
    high = max(1, first_guess)
    while high < MOST_STEPS and cost(high) <= limit:
        high *= 2
    return bisect_right(range(1, high + 1), limit, key=cost)


def _too_short(budget: Budget, calibration: Calibration, name: str, *, total: float, least: float) -> str:
    key, number = next((k, v) for k, v in _written(budget).items() if v is not None)
    needed = least if key != "share" else float(number) * least / total
    return (
        f"budget.{key}={number:g} is {_cost(total, calibration.unit)} and shorter than one step of {name!r}, which "
        f"takes {_cost(least, calibration.unit)}; write budget.{key}={_rounded_up(needed):g} or more, or drop the "
        f"method: methods: {{{name!r}: null}}"
    )


def _written(budget: Budget) -> Mapping[str, float | None]:
    share = None if budget.time_of is None else budget.share
    return {"seconds": budget.seconds, "flops": budget.flops, "share": share}


def _rounded_up(number: float) -> float:
    """Return the number rounded up to two digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit


def _cost(cost: float, unit: str) -> str:
    return f"{cost:.3g} s" if unit == "seconds" else f"{cost:.3g} FLOPs"
