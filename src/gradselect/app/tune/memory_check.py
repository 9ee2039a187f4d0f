"""Memory check: the plan of a trial against the memory, before the trial starts."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

from gradselect import UsageError
from gradselect.app.recipe import Recipe
from gradselect.app.recipe_planning import RecipePlanner, needed_bytes
from gradselect.app.runtime import device_memory
from gradselect.usage import first_line, write_size

logger = logging.getLogger(__name__)


class MemoryCheck:
    """Compares the planned peak of each trial with `--fit`, or with the memory of the device.

    Args:
        recipe: the recipe as written. If it cannot be planned, no trial is refused, and `note` says so.
        limit: bytes of `--fit`. None: the memory of the device that would train.

    Raises:
        UsageError: there is a limit, and the recipe cannot be planned.
    """

    def __init__(self, recipe: Recipe, *, limit: int | None) -> None:
        here = device_memory(recipe.run.device)
        self._memory = here if limit is None else replace(here, name="--fit", num_bytes=limit)
        self._planner = RecipePlanner()
        self._peaks: dict[str, int | None] = {}
        self.note = ""
        try:
            self._peaks[_key(recipe)] = needed_bytes(self._planner.plan(recipe), self._memory)
        # Whatever it is: a plan is no reason to refuse a search that could run.
        except Exception as error:
            if limit is not None:
                raise UsageError(f"--fit needs a plan of the trials: {first_line(error)}; leave --fit out") from error
            self.note = f"no trial is checked for its memory, because the recipe cannot be planned: {first_line(error)}"

    def complaint(self, recipe: Recipe) -> str:
        """Return the reason why a trial cannot fit, with numbers; nothing if it fits or has no plan."""
        if self.note:
            return ""
        key = _key(recipe)
        if key not in self._peaks:
            self._peaks[key] = self._peak(recipe)
        peak = self._peaks[key]
        if peak is None or peak <= self._memory.num_bytes:
            return ""
        limit = f"{write_size(self._memory.num_bytes)} of {self._memory.name}"
        return f"its planned peak is {write_size(peak)}, more than the {limit}"

    def _peak(self, recipe: Recipe) -> int | None:
        try:
            return needed_bytes(self._planner.plan(recipe), self._memory)
        except UsageError as error:
            # Values that do not fit the model end the trial with the same words.
            logger.warning("a trial could not be planned and is not checked for its memory: %s", first_line(error))
            return None


def _key(recipe: Recipe) -> str:
    """Return the part of the recipe that decides its memory."""
    values: dict[str, Any] = recipe.model_dump(mode="json", exclude={"optimizer": {"lr", "weight_decay", "warmup"}})
    return json.dumps(values)
