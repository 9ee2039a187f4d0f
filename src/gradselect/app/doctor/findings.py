"""One line of an examination."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

_MOST_LETTERS = 300
"""Letters of an exception; some list every file that they looked for."""


class Status(StrEnum):
    """Say if something works."""

    OK = "ok"
    MISSING = "missing"
    """Not installed, or too old: a feature that needs it is not there, everything else works."""
    NOTE = "note"
    """Slower or less than it could be."""
    BROKEN = "broken"
    """Installed or promised, and does not work."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that was looked at.

    Args:
        name: what was looked at: "gradselect tune", "cuda:0, fused AdamW".
        status: if it works.
        text: versions, sizes, or the error.
        advice: what to type or to do; empty if nothing is to be done.
    """

    name: str
    status: Status
    text: str
    advice: str = ""

    @classmethod
    def broken(cls, name: str, error: BaseException, *, advice: str) -> Finding:
        """Return what an exception says, on one line."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return cls(name=name, status=Status.BROKEN, text=text[:_MOST_LETTERS], advice=advice)
