"""Cells of a row as text: JSON values in the spelling of JSON, never Python's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any
from uuid import UUID

from gradselect.usage import UsageError

MAX_SHOWN = 40
"""Characters of a value in a message."""


def cell_text(value: Any) -> str:
    """Return a cell as text, as a template writes it.

    | cell | text |
    |---|---|
    | text | as it stands |
    | true, false | `true`, `false` |
    | whole number | its digits, however many |
    | number with a fraction | the shortest spelling of the same number: 2.50 is `2.5`, 1e3 is `1000.0` |
    | object, list, struct, map | one line of JSON with the characters as they are: `{"a": [1, "ü"]}` |
    | decimal (Parquet) | all its digits: `2.50` |
    | date, time, timestamp (Parquet) | ISO 8601: `2024-05-01T12:30:00` |
    | null, NaN, infinity, bytes, duration | refused |

    Raises:
        UsageError: the cell has no text of its own.

    Example:
        >>> cell_text(True), cell_text({"a": [1, None]}), cell_text("as it is")
        ('true', '{"a": [1, null]}', 'as it is')
    """
    match value:
        case str():
            return value
        case None:
            raise UsageError("is null; fill it in, or drop the row")
        case bool() | int() | float() | Mapping() | list() | tuple():
            return json.dumps(plain_value(value), ensure_ascii=False)
    return str(plain_value(value))


def is_empty(value: Any) -> bool:
    """True for a cell that holds nothing: null, a text of blanks, or a list or object without entries.

    Example:
        >>> is_empty(None), is_empty(" "), is_empty([]), is_empty(0), is_empty(False)
        (True, True, True, False, False)
    """
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | dict) and not value)


def label_text(value: Any) -> str:
    """Return a label or score as text: text as it stands, a boolean or a number in the spelling of JSON.

    Raises:
        UsageError: the cell is null, blank, NaN, or no single value.
    """
    if isinstance(value, Mapping | list | tuple):
        raise UsageError(f"is {_shown(value)}, and a label is one text or number")
    if is_empty(value):
        raise UsageError(
            "is null; fill it in, or drop the row" if value is None else "is empty; fill it in, or drop it"
        )
    return cell_text(value)


def plain_value(value: Any) -> Any:
    """Return the value with only types that JSON has.

    Raises:
        UsageError: it holds something that no JSON has, as NaN or bytes.
    """
    match value:
        case str() | bool() | int() | None:
            return value
        case float():
            if not math.isfinite(value):
                raise UsageError(f"holds {value}, which is no number that can be written; fill it in, or drop the row")
            return value
        case Decimal():
            return format(value, "f")
        case datetime() | date() | time():
            return value.isoformat()
        case UUID():
            return str(value)
        case Mapping():
            return {cell_text(key): plain_value(item) for key, item in value.items()}
        case list() | tuple():
            return [plain_value(item) for item in value]
    kind = "bytes" if isinstance(value, bytes | bytearray | memoryview) else f"a {type(value).__name__}"
    raise UsageError(
        f"holds {kind} ({_shown(value)}), which is no text; write text into the column, or use another one"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
