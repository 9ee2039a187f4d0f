"""Rows of JSON and JSON Lines."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gradselect.usage import UsageError, printable

from .row import NumberedRow, Origin, Row, Rows
from .text_lines import lines

MOST_NAMES = 500
"""Characters of names that an error shows."""

MOST_LEVELS = 3
"""Levels of keys above a list of rows: {"data": {"train": [...]}} has two."""

_OF_MESSAGES = {"role", "from"}
"""Keys of a message: a list of these is one conversation, and no list of rows."""

_BLANK = " \t\r\n"
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_log = logging.getLogger(__name__)


def read_jsonl(path: Path) -> Rows:
    """Return one row for each line. A file that is one list of objects is read as one, whatever its name says."""
    first = next((line for line in lines(path) if line.strip()), "")
    items = _list_or_none(path) if first.lstrip().startswith("[") else None
    if items is None:
        return _rows_of_lines(path)
    return _rows_of_list(items, path=path, unit="item of the list", is_escaped=True)


def read_json(path: Path, rows_key: str | None = None) -> Rows:
    """Return the rows of a list of objects, of a list under a key of an object, or of JSON Lines.

    Args:
        path: the file.
        rows_key: the key; dotted if it lies deeper. Default: the only list of objects.
    """
    text = "".join(lines(path, is_one_text=True)).rstrip(_BLANK)
    if not text:
        return Rows()
    value, end = _parse_first(text, path=path)
    unit = "item of the list"
    if end < len(text) and isinstance(value, dict):
        return _rows_of_objects(path, first=text[:end], rows_key=rows_key)
    if end < len(text):
        _parse(text, path=path, first_line=1)  # raises: names the line of what follows
    if isinstance(value, dict):
        key, value = _under_a_key(value, path=path, rows_key=rows_key)
        unit = f"item of {key!r}"
    elif rows_key is not None:
        raise _key_without_object(path, rows_key, "a list of rows" if isinstance(value, list) else _kind(value))
    if not isinstance(value, list):
        raise _no_list(path, value)
    return _rows_of_list(value, path=path, unit=unit, is_escaped="\\u" in text)


def _rows_of_lines(path: Path) -> Rows:
    return Rows(_objects_of_lines(path), Origin(str(path), "line"))


def _objects_of_lines(path: Path) -> Iterator[NumberedRow]:
    for number, line in enumerate(lines(path), start=1):
        if line.strip():
            item = _parse(line.rstrip(), path=path, first_line=number)
            if not isinstance(item, dict) or "\\u" in line:
                _check_object(item, where=f"{path}, line {number}")
            yield number, item


def _rows_of_objects(path: Path, *, first: str, rows_key: str | None) -> Rows:
    """Return the rows of JSON Lines in a file that is called .json and begins with the object `first`."""
    if "\n" in first.lstrip(_BLANK):
        line = first.count("\n") + 1
        raise UsageError(
            f"{path}, line {line}: another object follows the one that ends here, and they take several lines; write "
            "[{...}, {...}], or one object a line (jq -c . FILE > lines.jsonl)"
        )
    if rows_key is not None:
        raise _key_without_object(path, rows_key, "one object a line")
    return _rows_of_lines(path)


def _rows_of_list(items: list[Any], *, path: Path, unit: str, is_escaped: bool) -> Rows:
    one, of = unit.split(" ", 1)
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict) or is_escaped:
            _check_object(item, where=f"{path}, {one} {number} {of}")
    return Rows.counted(items, Origin(str(path), unit))


def _list_or_none(path: Path) -> list[Any] | None:
    """Return the list of objects that the whole file is, or None."""
    try:
        items = _parse("".join(lines(path, is_one_text=True)).strip(_BLANK), path=path, first_line=1)
    except UsageError:
        return None
    return items if isinstance(items, list) and all(isinstance(item, dict) for item in items) else None


# Rows under a key ----------------------------------------------------------------------------------------------------


def _under_a_key(value: Row, *, path: Path, rows_key: str | None) -> tuple[str, list[Any]]:
    """Return the list of rows in an object, and its key."""
    found = {".".join(keys): items for keys, items in _lists_of_objects(value, ())}
    there = printable(", ".join(f"{key} ({len(items):,} rows)" for key, items in found.items()))[:MOST_NAMES]
    if rows_key is not None:
        if rows_key not in found:
            raise UsageError(
                f"{path}: data.rows_key={rows_key!r} holds no list of objects; lists of objects are: {there or 'none'}"
            )
        return rows_key, found[rows_key]
    highest = min((key.count(".") for key in found), default=0)
    keys = [key for key in found if key.count(".") == highest]
    if not keys:
        raise _no_list(path, value)
    if len(keys) > 1:
        raise UsageError(
            f"{path}: an object with several lists of rows: {there}; write data.rows_key={keys[0]} (gradselect "
            f"evaluate: --rows-key {keys[0]})"
        )
    _log.warning("%s: read the %s rows under the key %s", path, f"{len(found[keys[0]]):,}", printable(repr(keys[0])))
    return keys[0], found[keys[0]]


def _lists_of_objects(value: Row, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    for key, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], dict) and not item[0].keys() & _OF_MESSAGES:
            yield (*above, key), item
        elif isinstance(item, dict) and len(above) + 1 < MOST_LEVELS:
            yield from _lists_of_objects(item, (*above, key))


def _key_without_object(path: Path, rows_key: str, found: str) -> UsageError:
    return UsageError(
        f"{path}: data.rows_key={rows_key!r} is for a file that holds one object, and this one holds {found}; leave "
        "it out"
    )


def _no_list(path: Path, value: Any) -> UsageError:
    return UsageError(
        f"{path}: expected a list of objects, got {_kind(value)}; write [{{...}}, ...], or one object a line in a file "
        "that ends in .jsonl (in pandas: frame.to_json('data.jsonl', orient='records', lines=True))"
    )


# Parsing -------------------------------------------------------------------------------------------------------------


class _KeyTwiceError(Exception):
    """A key stands twice in one object; the argument is the key."""


class _NoNumberError(Exception):
    """A value that JSON does not have; the argument is NaN, Infinity or -Infinity."""


def _without_doubles(pairs: Sequence[tuple[str, Any]]) -> Row:
    """Return a JSON object. Python would silently take the last of equal keys."""
    item = dict(pairs)
    if len(item) < len(pairs):
        raise _KeyTwiceError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return item


def _refuse_constant(name: str) -> NoReturn:
    raise _NoNumberError(name)


# `json.loads` with arguments makes a decoder for each call.
_DECODER = json.JSONDecoder(object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
_FAULTS = (_KeyTwiceError, _NoNumberError, RecursionError, ValueError)


def _parse(text: str, *, path: Path, first_line: int) -> Any:
    """Parse JSON text that begins at line `first_line` of the file at `path`."""
    try:
        # With the line end, the error of a text that ends too early would name the next line.
        return _DECODER.decode(text.rstrip("\r\n"))
    except _FAULTS as error:
        raise _explained(error, text, path=path, first_line=first_line) from None


def _parse_first(text: str, *, path: Path) -> tuple[Any, int]:
    """Return the first JSON value of a file's text, and its end."""
    try:
        return _DECODER.raw_decode(text, len(text) - len(text.lstrip(_BLANK)))
    except _FAULTS as error:
        raise _explained(error, text, path=path, first_line=1) from None


def _explained(error: Exception, text: str, *, path: Path, first_line: int) -> UsageError:
    where = str(path) if "\n" in text.strip() else f"{path}, line {first_line}"
    match error:
        case _KeyTwiceError():
            return UsageError(f"{where}: the key {error.args[0]!r:.60} stands twice in one object")
        case _NoNumberError():
            line = first_line + _line_of(error.args[0], text)
            return UsageError(
                f"{path}, line {line}: {error.args[0]} is no value of JSON; fill it in, write null, or drop the row"
            )
        case json.JSONDecodeError():
            line = first_line + error.lineno - 1
            return UsageError(
                f"{path}, line {line}: broken JSON ({error.msg} at column {error.colno}){_unfinished(text, error)}"
            )
        case RecursionError():
            return UsageError(f"{where}: JSON with too many brackets inside one another")
    # Python reads whole numbers of up to 4,300 digits.
    return UsageError(f"{where}: a number with thousands of digits; write it as a text, in quotes")


def _unfinished(text: str, error: json.JSONDecodeError) -> str:
    """Return advice if one line ends within an object: one that takes several lines begins with such a line."""
    if "\n" in text.strip() or error.pos < len(text.rstrip()) or not text.lstrip().startswith(("{", "[")):
        return ""
    return (
        "; the line ends within an object: if objects take several lines, jq -c . FILE > lines.jsonl writes one a line"
    )


def _line_of(constant: str, text: str) -> int:
    """Return the number of line ends before the first `constant` outside of a string."""
    outside = re.finditer(rf'"(?:[^"\\]|\\.)*"|(?P<constant>{re.escape(constant)})', text, re.DOTALL)
    return next((text.count("\n", 0, match.start()) for match in outside if match["constant"]), 0)


def _check_object(item: Any, *, where: str) -> None:
    """Check that an item is an object without halves of characters, which JSON can write as \\u escapes."""
    if not isinstance(item, dict):
        raise UsageError(f'{where}: expected an object like {{"question": ..., "answer": ...}}, got {_kind(item)}')
    if _HALF_CHARACTER.search(json.dumps(item, ensure_ascii=False)):
        raise UsageError(f"{where}: half of a character (\\ud800 to \\udfff without its other half), which no text has")


def _kind(item: Any) -> str:
    """Describe a JSON value: its type and its beginning."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    text = json.dumps(item, ensure_ascii=False)
    # Characters that cannot be shown become escape codes.
    text = text if text[:40].isprintable() else json.dumps(item)
    return f"{names.get(type(item), 'a number')}: {text[:40]}{'...' if len(text) > 40 else ''}"
