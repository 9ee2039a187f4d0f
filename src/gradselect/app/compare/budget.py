"""The section `budget` of a suite, and the recipe of a run that has as many steps as fit into it."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from gradselect.app.recipe import Recipe, Settings
from gradselect.usage import read_size, smallest_text

PHASES = ("explore_steps", "probe_steps", "steps")
"""Keys of methods that give the length of a phase as a number of steps. They keep their share of the run."""

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
    rounds: Annotated[int, Field(ge=1, le=1000)] = 5
    round_steps: Annotated[int, Field(ge=2, le=1000)] = 11

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

    def scaled(count: float) -> int:
        return max(1, round(count * steps / run_steps))

    method, warmup = recipe.method, recipe.optimizer.warmup
    phases = {key: value for key in PHASES if isinstance(value := getattr(method, key, None), int) and value > 0}
    changes: dict[str, Any] = {
        "run": recipe.run.model_copy(update={"steps": steps, "epochs": None}),
        "method": method.model_copy(update={key: scaled(count) for key, count in phases.items()}),
    }
    if warmup >= 1:
        changes["optimizer"] = recipe.optimizer.model_copy(update={"warmup": float(scaled(warmup))})
    return recipe.model_copy(update=changes)
