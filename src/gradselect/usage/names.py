"""Names and patterns of blocks and parameters: one glob matcher, the nearest name, dotted paths."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase


def matches(names: Sequence[str], glob: str) -> bool:
    return any(fnmatchcase(name, glob) for name in names)


def nearest(pattern: str, names: Sequence[str]) -> str:
    return ", ".join(map(repr, difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)))


def as_tuple(globs: str | Sequence[str]) -> tuple[str, ...]:
    return (globs,) if isinstance(globs, str) else tuple(globs)


def beginnings(path: str) -> list[str]:
    """Of "a.b.c": "a", "a.b" and "a.b.c"."""
    parts = path.split(".")
    return [".".join(parts[: index + 1]) for index in range(len(parts))]


def parent(path: str) -> str:
    return path.rpartition(".")[0]


def join(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")
