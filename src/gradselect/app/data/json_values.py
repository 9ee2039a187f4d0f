"""JSON values inside cells."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """Return the value that a text holds as JSON, or None if it is no JSON. NaN is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def without_nulls(value: Any) -> Any:
    """Return the value without the null entries of its objects, at any depth."""
    match value:
        case dict():
            return {key: without_nulls(item) for key, item in value.items() if item is not None}
        case list():
            return [without_nulls(item) for item in value]
    return value


def shown(value: Any) -> str:
    """Return the beginning of a value, for an error."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text[:60] + ("..." if len(text) > 60 else "")
    return repr(text) if isinstance(value, str) or not text.isprintable() else text
