"""Text with columns in braces, as in `str.format`, but with plain names only."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Any

from gradselect.usage import UsageError


def check_template(template: str) -> str:
    """Return the template if it is well formed.

    Raises:
        UsageError: a brace is left open, or a field is no plain column name. A literal brace is written twice.
    """
    columns_of(template)
    return template


def columns_of(template: str) -> tuple[str, ...]:
    """Return the columns that a template reads, each once.

    Example:
        >>> columns_of("Question: {question}\\nAnswer:")
        ('question',)
    """
    return tuple(dict.fromkeys(column for _, column in _parts(template) if column is not None))


def render(template: str, row: Mapping[str, Any]) -> str:
    """Return the template with each column replaced by the row's value.

    Raises:
        UsageError: a column that the template reads is empty (null) in this row.
    """
    return "".join(
        literal + ("" if column is None else _text(row[column], column)) for literal, column in _parts(template)
    )


def _parts(template: str) -> list[tuple[str, str | None]]:
    """Return pairs of literal text and the column after it."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"template {template!r}: {error}; a literal brace is written twice, {{{{ or }}}}") from None
    for _, column, spec, conversion in parts:
        if column is not None and (not column or spec or conversion or any(sign in column for sign in ".[]")):
            raise UsageError(
                f"template {template!r}: braces hold the plain name of a column, as in {{question}}; "
                f"a literal brace is written twice, {{{{ or }}}}"
            )
    return [(literal, column) for literal, column, _, _ in parts]


def _text(value: Any, column: str) -> str:
    if value is None:
        raise UsageError(f"column {column!r} is null; fill it in, or drop the row")
    return str(value)
