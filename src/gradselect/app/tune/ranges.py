"""Search ranges: a key of the recipe and the values to try."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradselect import UsageError
from gradselect.app.recipe import Recipe, parse_recipe
from gradselect.usage import flatten

Number = int | float

FORM = "write KEY=LOW:HIGH or KEY=LOW:HIGH:log, e.g. optimizer.lr=1e-5:1e-3:log"
JUDGES = ("data", "run.seed", "run.evaluate_every")
"""Keys that decide what a trial is measured on, or when. With other values losses could not be compared."""


@dataclass(frozen=True, kw_only=True)
class SearchRange:
    """A range of values for one key.

    Args:
        key: of the recipe: "optimizer.lr".
        low: the smallest value.
        high: the largest value, included.
        log: draw evenly in the logarithm.
        whole: draw integers only.

    Raises:
        UsageError: the range is empty, or goes down to 0 with `log`.
    """

    key: str
    low: Number
    high: Number
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UsageError(f"--search {self}: LOW must be a number below HIGH; {FORM}")
        if self.log and self.low <= 0:
            raise UsageError(f"--search {self}: a logarithm needs LOW above 0; {FORM}")

    def __str__(self) -> str:
        return f"{self.key}={_short(self.low)}:{_short(self.high)}{':log' if self.log else ''}"

    @property
    def exact(self) -> str:
        """The range with all digits, as a study keeps it."""
        return f"{self.key}={self.low!r}:{self.high!r}{':log' if self.log else ''}"

    def has(self, value: Any) -> bool:
        """Return True if `value` is a number in the range."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def position(self, value: Number) -> float:
        """Return the position of `value`, from 0.0 at `low` to 1.0 at `high`."""
        low, high, at = (map(math.log, (self.low, self.high, value))) if self.log else (self.low, self.high, value)
        return (at - low) / (high - low)


def read_ranges(texts: Sequence[str], recipe: Recipe) -> tuple[SearchRange, ...]:
    """Return the ranges that the user wrote, or without any the default ones of the recipe.

    Raises:
        UsageError: a text has another form; a key is not in the recipe, holds no number, stands twice or decides what
            is measured; or the recipe refuses an end of the range.
    """
    ranges = tuple(_read_range(text, recipe) for text in texts) or tuple(usual_ranges(recipe))
    keys = [searched.key for searched in ranges]
    for searched in ranges:
        if keys.count(searched.key) > 1:
            raise UsageError(f"--search {searched}: the key stands twice; give one range for it")
        for value in (searched.low, searched.high):
            with_values(recipe, {searched.key: value}, source=f"{searched.key}={value} of --search {searched}")
    return ranges


def usual_ranges(recipe: Recipe) -> Iterator[SearchRange]:
    """Yield ranges around the recipe's learning rate and, where the method has them, its fraction and its delta."""
    lr, method = recipe.optimizer.lr, recipe.method.model_dump()
    yield SearchRange(key="optimizer.lr", low=lr / 10, high=lr * 10, log=True)
    if "fraction" in method and method.get("count") is None:
        fraction = method["fraction"] or 0.2  # AdaGradSelect's own default
        yield SearchRange(key="method.fraction", low=fraction / 2, high=min(1.0, 2 * fraction))
    if "delta" in method:
        # Top-k of a Dirichlet draw is close to winner-takes-all; only a delta of hundreds loosens it.
        yield SearchRange(key="method.delta", low=method["delta"] / 10, high=method["delta"] * 1000, log=True)


def _short(value: Number) -> str:
    """Return a number without the last digits, where 5e-05 / 10 is 4.9999999999999996e-06."""
    return repr(float(f"{value:.12g}")) if isinstance(value, float) else str(value)


def with_values(recipe: Recipe, values: Mapping[str, Any], *, source: str) -> Recipe:
    """Return the recipe with other values at some keys; `source` names them in errors.

    Raises:
        UsageError: the recipe refuses one of them.
    """
    tree = recipe.model_dump(mode="json")
    for key, value in values.items():
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section[name]
        section[last] = value
    return parse_recipe(tree, source=source)


def numbers_of(recipe: Recipe) -> dict[str, Any]:
    """Return every key of the recipe that can hold a number, with its value; None where none is set."""
    return {key: value for key, value in flatten(recipe.model_dump(mode="json")) if _can_be_number(value)}


def _can_be_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _read_range(text: str, recipe: Recipe) -> SearchRange:
    key, equals, rest = text.partition("=")
    parts = rest.split(":")
    if not (key and equals) or len(parts) not in (2, 3) or parts[2:] not in ([], ["log"]):
        raise UsageError(f"--search {text!r} is no range; {FORM}")
    known = numbers_of(recipe)
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        raise UsageError(
            f"--search {text!r}: the recipe has no number at {key!r}"
            + (f", did you mean {close[0]!r}?" if close else f" (it has: {', '.join(known)})")
        )
    if key.startswith(f"{JUDGES[0]}.") or key in JUDGES:
        raise UsageError(f"--search {text!r}: {key} decides what a trial is measured on; leave it as it is")
    low, high = (_read_number(part, text) for part in parts[:2])
    are_whole = isinstance(low, int) and isinstance(high, int)
    whole = are_whole and (known[key] is None or isinstance(known[key], int))
    return SearchRange(key=key, low=low, high=high, log=len(parts) == 3, whole=whole)


def _read_number(word: str, text: str) -> Number:
    try:
        return int(word)
    except ValueError:
        pass
    try:
        return float(word)
    except ValueError:
        raise UsageError(f"--search {text!r}: {word!r} is no number; {FORM}") from None
