"""The section `budget` of a suite, and the recipe of a run that has as many steps as fit into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from gradselect.app.recipe import Recipe, Settings
from gradselect.usage import read_size, smallest_text

PHASES = ("explore_steps", "probe_steps", "steps")
"""Keys of methods that give the length of a phase as a number of steps. They keep their share of the run."""

LEAST_ROUNDS = 3
"""Rounds of a calibration whose median is not moved by one of them."""

LEAST_ROUND_STEPS = 4
"""Measured steps of a turn, of which one may explore: the median of the three others is not moved by one of them."""

FORMS = "time_of: full, seconds: 600, flops: 1e15 or memory: 2GiB"


class Budget(Settings):
    """Cost that every run may take, in place of a number of steps.

    At most one of `time_of`, `seconds` and `flops`, which give every method as many steps as fit. The cost of a step is
    measured before the search, on this machine. With `memory` alone every run has the recipe's steps.

    Attributes:
        time_of: method of the suite whose time for the recipe's steps is the budget of all, e.g. full.
        share: factor on that time.
        seconds: seconds of the training steps of a run, without loading and evaluation.
        flops: FLOPs of a run, as `torch.utils.flop_counter` counts those of its steps.
        memory: bytes that a method may take, e.g. 2GiB. On a CPU its weights, gradients, masters and optimizer state
            are counted, on an accelerator the peak of torch's allocator. Others are left out.
        rounds: rounds of the calibration. In each the methods take turns.
        round_steps: measured steps of a turn, after two steps of warm-up.
    """

    time_of: str | None = None
    share: PositiveFloat = 1.0
    seconds: PositiveFloat | None = None
    flops: PositiveFloat | None = None
    memory: PositiveInt | None = None
    rounds: Annotated[int, Field(le=1000)] = 5
    round_steps: Annotated[int, Field(le=1000)] = 11

    @model_validator(mode="before")
    @classmethod
    def read_memory(cls, values: Any) -> Any:
        """Read a size as people write it."""
        if not isinstance(values, dict | Budget):
            raise ValueError(f"got {values!r}, which does not say what it is of; write {FORMS}")
        if isinstance(values, Budget) or not isinstance(values.get("memory"), str):
            return values
        try:
            return {**values, "memory": read_size(values["memory"])}
        except ValueError as error:
            raise ValueError(f"memory: {error}") from None

    @model_validator(mode="after")
    def check_forms(self) -> Self:
        given = [key for key in ("time_of", "seconds", "flops") if getattr(self, key) is not None]
        if len(given) > 1:
            wrote = " and ".join(f"{key}={getattr(self, key)!r}" for key in given)
            raise ValueError(f"got {wrote}; give one of them, and drop the others of a base with null")
        if not given and self.memory is None:
            raise ValueError(f"it limits nothing; write {FORMS}, or budget: null for the recipe's steps")
        if self.share != 1 and self.time_of is None:
            raise ValueError(f"share={self.share:g} is a factor on time_of; write e.g. time_of: full, or leave it out")
        return self

    @model_validator(mode="after")
    def check_calibration(self) -> Self:
        if self.rounds < LEAST_ROUNDS:
            raise ValueError(
                f"rounds={self.rounds}: the median of fewer than {LEAST_ROUNDS} rounds keeps the one that another "
                f"process disturbed, and their spread does not show it; write rounds: {LEAST_ROUNDS} or more"
            )
        if self.round_steps < LEAST_ROUND_STEPS:
            raise ValueError(
                f"round_steps={self.round_steps}: among fewer than {LEAST_ROUND_STEPS} steps of a turn, of which one "
                "explores, none can be told from one that another process disturbed; write round_steps: "
                f"{LEAST_ROUND_STEPS} or more"
            )
        return self

    @property
    def limits_steps(self) -> bool:
        """True if the steps of a run come from the budget."""
        return any(value is not None for value in (self.time_of, self.seconds, self.flops))

    def text(self) -> str:
        """Return the budget as a suite writes it."""
        parts = {"time_of": self.time_of, "seconds": self.seconds, "flops": self.flops}
        words = [f"{key}: {_word(value)}" for key, value in parts.items() if value is not None]
        words += [f"share: {self.share:g}"] if self.share != 1 else []
        words += [f"memory: {smallest_text(self.memory)}"] if self.memory is not None else []
        return ", ".join(words)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def with_steps(recipe: Recipe, *, steps: int, run_steps: int) -> Recipe:
    """Return the recipe with another number of steps. What is a share of the run stays that share.

    Schedules follow the number of steps by themselves. A warm-up or a phase of a method that is a number of steps is
    scaled, e.g. 62 explore steps of 250 to 77 of 310. Periods, such as `every`, stay.

    Args:
        recipe: recipe of the run.
        steps: new number of steps.
        run_steps: number of steps that the recipe was written for.
    """

    changes = {"steps": steps, "epochs": None}
    return _with_length(recipe, changes, scaled=lambda count: count * steps / run_steps)


def with_share(recipe: Recipe, share: float) -> Recipe:
    """Return the recipe of a run that has this share of its length, otherwise as `with_steps`."""
    steps, epochs = recipe.run.steps, recipe.run.epochs
    if steps is not None:
        return with_steps(recipe, steps=share_of(steps, share), run_steps=steps)
    assert epochs is not None
    return _with_length(recipe, {"epochs": epochs * share}, scaled=lambda count: count * share)


def share_of(steps: int, share: float) -> int:
    """Return this share of a number of steps, at least one step."""
    return max(1, round(steps * share))


def _with_length(recipe: Recipe, changes: dict[str, Any], *, scaled: Callable[[float], float]) -> Recipe:
    """Return the recipe with these changes of its length, and all that is a number of steps scaled with it."""

    def whole(count: float) -> int:
        return max(1, round(scaled(count)))

    method, warmup = recipe.method, recipe.optimizer.warmup
    phases = {key: value for key in PHASES if isinstance(value := getattr(method, key, None), int) and value > 0}
    parts: dict[str, Any] = {
        "run": recipe.run.model_copy(update=changes),
        "method": method.model_copy(update={key: whole(count) for key, count in phases.items()}),
    }
    if warmup >= 1:
        parts["optimizer"] = recipe.optimizer.model_copy(update={"warmup": float(whole(warmup))})
    return recipe.model_copy(update=parts)
