"""Differences between two nested settings, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Difference(NamedTuple):
    """A setting with two values.

    Args:
        key: dotted path, "run.steps".
        old: value on one side; None where that side has no such key.
        new: value on the other side.
    """

    key: str
    old: Any
    new: Any


def find_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield every setting whose value differs, sorted by key. A missing key and None are the same.

    Example:
        >>> list(find_differences({"run": {"steps": 3, "seed": 0}}, {"run": {"steps": 5, "seed": 0}}))
        [Difference(key='run.steps', old=3, new=5)]
    """
    before, after = dict(flatten(old)), dict(flatten(new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield Difference(key, before.get(key), after.get(key))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value with its dotted key: ("run.steps", 300). An empty mapping yields nothing."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
