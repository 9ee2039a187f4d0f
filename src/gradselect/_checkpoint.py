"""What a checkpoint must agree on with the run that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._errors import UsageError


def check_same(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Every entry of `ours` stands in `saved` with an equal value.

    Raises:
        UsageError: names the first entry that differs, and both values.
    """
    for what, value in ours.items():
        if _plain(saved[what]) != _plain(value):
            difference = _difference(_plain(saved[what]), _plain(value))
            raise UsageError(f"the checkpoint is of another run: its {what.replace('_', ' ')} {difference}")


def _plain(value: Any) -> Any:
    """Tuples as lists: a checkpoint may have passed through a format that knows lists only."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _difference(theirs: Any, ours: Any) -> str:
    """In one line, what the first difference between two plain values is."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        key = next(key for key in (*theirs, *ours) if theirs.get(key) != ours.get(key))
        return f"have {key}={_short(theirs.get(key))}, this run's {key}={_short(ours.get(key))}"
    return f"are {_short(theirs)}, this run's {_short(ours)}"


def _short(value: Any, *, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
