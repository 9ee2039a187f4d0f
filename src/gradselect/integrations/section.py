"""The section of a framework's settings that holds a method and the file of its records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradselect.methods import AbstractSelectionMethod, parse_selection
from gradselect.usage import UsageError


def parse_section(section: Any, *, key: str) -> tuple[AbstractSelectionMethod, str | None]:
    """Return the method of a section, and the file for the records.

    Args:
        section: keys of a method and `jsonl`; or the name of a method alone.
        key: name of the section, for errors.

    Raises:
        UsageError: one line for each wrong key or value.

    Example:
        >>> parse_section({"name": "uniform", "count": 2, "jsonl": "selection.jsonl"}, key="gradselect")[1]
        'selection.jsonl'
    """
    if not isinstance(section, Mapping):
        return parse_selection(section, key=key), None
    values = dict(section)
    jsonl = values.pop("jsonl", None)
    if jsonl is not None and not isinstance(jsonl, str):
        raise UsageError(f"{key}.jsonl={jsonl!r} is no file name; write e.g. {key}.jsonl=selection.jsonl")
    return parse_selection(values, key=key), jsonl
