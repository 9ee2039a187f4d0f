"""Names and glob patterns of blocks, parameters and methods; nearest names; dotted paths."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from .errors import UsageError


def matching(
    names: Iterable[str], patterns: str | Sequence[str], *, kind: str, key: str = "", ignore_case: bool = False
) -> tuple[str, ...]:
    """Return the names that match at least one glob pattern, in their own order.

    Args:
        names: all names that exist.
        patterns: globs such as "layer.1?"; a single one may stand alone.
        kind: what has these names, for the error: "parameter that trains".
        key: the setting that holds the patterns, for the error: "no_decay".
        ignore_case: upper and lower case are the same.

    Raises:
        UsageError: a pattern matches nothing; names it and the nearest names.

    Example:
        >>> matching(["layer.0", "layer.1", "norm"], "layer.*", kind="block")
        ('layer.0', 'layer.1')
    """
    names = tuple(names)
    matched: set[str] = set()
    for pattern in as_tuple(patterns):
        found = [name for name in names if _is_match(name, pattern, ignore_case=ignore_case)]
        if not found:
            setting = f"{key}=" if key else ""
            near = nearest(pattern, names) or "there is none"
            raise UsageError(f"{setting}{pattern!r} matches no {kind}; nearest: {near}")
        matched.update(found)
    return tuple(name for name in names if name in matched)


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """True if the name matches one of the glob patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def nearest(pattern: str, names: Sequence[str]) -> str:
    """Return the three names that look most like the pattern, quoted and separated by commas."""
    return ", ".join(map(repr, difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)))


def as_tuple(globs: str | Sequence[str]) -> tuple[str, ...]:
    """Return the patterns as a tuple; a single one may stand alone."""
    return (globs,) if isinstance(globs, str) else tuple(globs)


def beginnings(path: str) -> list[str]:
    """Return a dotted path and all paths above it, shortest first: "a.b" gives "a" and "a.b"."""
    parts = path.split(".")
    return [".".join(parts[: index + 1]) for index in range(len(parts))]


def parent(path: str) -> str:
    """Return the dotted path without its last name."""
    return path.rpartition(".")[0]


def join(path: str, name: str) -> str:
    """Return the dotted path of `name` below `path`; either may be empty."""
    return f"{path}.{name}".strip(".")


def _is_match(name: str, pattern: str, *, ignore_case: bool) -> bool:
    return fnmatchcase(name.lower(), pattern.lower()) if ignore_case else fnmatchcase(name, pattern)
