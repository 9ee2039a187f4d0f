"""Text with columns in braces, as in `str.format`, but with plain names only, and with optional parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter
from typing import Any

from gradselect.usage import UsageError

from .cells import cell_text, is_empty

_ADVICE = "a literal brace is written twice, {{ or }}"


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a template.

    Args:
        literal: text as it stands.
        column: the column that follows the text, if any.
        part: pieces of an optional part, written where `column` is not empty. None: the column itself is written.
    """

    literal: str
    column: str | None = None
    part: tuple[Piece, ...] | None = None


def check_template(template: str) -> str:
    """Return the template if it is well formed.

    Raises:
        UsageError: a brace is left open, or a field is no plain column name. A literal brace is written twice.
    """
    _pieces(template)
    return template


def columns_of(template: str) -> tuple[str, ...]:
    """Return the columns that every row must have, each once. Those of optional parts are not among them.

    Example:
        >>> columns_of("Question: {question}\\n{?hint:Hint: {hint}\\n}Answer:")
        ('question',)
    """
    pieces = _pieces(template)
    return tuple(dict.fromkeys(piece.column for piece in pieces if piece.column is not None and piece.part is None))


def optional_columns_of(template: str) -> tuple[str, ...]:
    """Return the columns that decide on the optional parts, each once.

    Example:
        >>> optional_columns_of("{question}\\n{?hint:Hint: {hint}\\n}Answer:")
        ('hint',)
    """
    pieces = _pieces(template)
    return tuple(dict.fromkeys(piece.column for piece in pieces if piece.column is not None and piece.part is not None))


def render(template: str, row: Mapping[str, Any]) -> str:
    """Return the template with each column replaced by the row's cell, as `cell_text` writes it.

    An optional part, `{?input:Input: {input}}`, is left out where its column is missing, null or empty.

    Raises:
        UsageError: a column that the template writes is missing, null, or cannot be written as text.

    Example:
        >>> template = "{task}{?input:, with {input}}."
        >>> render(template, {"task": "Add", "input": [2, 3]}), render(template, {"task": "Rest", "input": ""})
        ('Add, with [2, 3].', 'Rest.')
    """
    return _written(_pieces(template), row)


def says_nothing(template: str, row: Mapping[str, Any]) -> bool:
    """True if the template reads columns, and all that it reads are missing or empty in this row."""
    columns = _all_columns(template)
    return bool(columns) and all(is_empty(row.get(column)) for column in columns)


@lru_cache(maxsize=256)
def _all_columns(template: str) -> tuple[str, ...]:
    return (*columns_of(template), *optional_columns_of(template))


def _written(pieces: Sequence[Piece], row: Mapping[str, Any]) -> str:
    return "".join([piece.literal + _text(piece, row) for piece in pieces])


def _text(piece: Piece, row: Mapping[str, Any]) -> str:
    column = piece.column
    if column is None:
        return ""
    if piece.part is not None:
        return "" if is_empty(row.get(column)) else _written(piece.part, row)
    if column not in row:
        raise UsageError(f"no column {column!r}, which an optional part of the template writes")
    try:
        return cell_text(row[column])
    except UsageError as error:
        raise UsageError(f"column {column!r} {error}") from None


@lru_cache(maxsize=256)
def _pieces(template: str) -> tuple[Piece, ...]:
    return tuple(_parsed(template, of=template))


def _parsed(text: str, *, of: str, is_part: bool = False) -> Iterator[Piece]:
    """Yield the pieces of a template or of one of its optional parts."""
    try:
        fields = list(Formatter().parse(text))
    except ValueError as error:
        part = "; an optional part ends with a brace of its own, as in {?input:Input: {input}}" if "{?" in of else ""
        raise UsageError(f"template {of!r}: {error}; {_ADVICE}{part}") from None
    for literal, column, spec, conversion in fields:
        if column is not None and column.startswith("?") and spec and not conversion and not is_part:
            name = _checked(column[1:], of=of)
            yield Piece(literal, name, tuple(_parsed(spec, of=of, is_part=True)))
        elif column is not None and (spec or conversion):
            inside = "an optional part holds plain columns only; " if is_part else ""
            raise UsageError(f"template {of!r}: {inside}{_braces_hold()}")
        else:
            yield Piece(literal, None if column is None else _checked(column, of=of))


def _checked(column: str, *, of: str) -> str:
    if not column or any(sign in column for sign in ".[]"):
        raise UsageError(f"template {of!r}: {_braces_hold()}")
    return column


def _braces_hold() -> str:
    return (
        "braces hold the plain name of a column, as in {question}, or an optional part, as in "
        f"{{?input:Input: {{input}}}}; {_ADVICE}"
    )
