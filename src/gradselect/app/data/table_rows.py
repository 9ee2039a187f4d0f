"""Rows of CSV and TSV."""

from __future__ import annotations

import csv
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradselect.usage import UsageError, printable

from .json_rows import MOST_NAMES
from .row import NumberedRow, Origin, Rows
from .text_lines import lines

LONGEST_FIELD = 2**26
"""Characters of a cell. A quote sign that nothing closes would take the rest of the file."""

_log = logging.getLogger(__name__)
_limit_lock = threading.RLock()


def read_csv(path: Path, columns: Sequence[str] | None = None) -> Rows:
    """Return the rows of a table with commas. Every cell is text, as it stands."""
    return _rows(path, csv.reader(lines(path), strict=True), columns)


def read_tsv(path: Path, columns: Sequence[str] | None = None) -> Rows:
    """Return the rows of a table with tabs."""
    # Fields of a TSV hold no tabs and no line ends, so a quote sign is a character like any other.
    rows = _rows(path, csv.reader(lines(path), delimiter="\t", quoting=csv.QUOTE_NONE), columns)
    quoted = [index for index, row in enumerate(rows) if any(_is_quoted(cell) for cell in row.values())]
    if quoted:
        _log.warning(
            "%s: cells of %d of %d rows are quoted as in CSV, the first in line %s: in a .tsv file quote signs belong "
            "to the text; save it as .csv, or without quotes (in pandas: sep='\\t', quoting=csv.QUOTE_NONE)",
            *(path, len(quoted), len(rows), rows.place(quoted[0]).rpartition(" ")[2]),
        )
    return rows


def _is_quoted(cell: str) -> bool:
    """True for a cell between quote signs with doubled ones inside, as CSV has them."""
    inside = cell[1:-1]
    return cell[:1] == '"' == cell[-1:] and '""' in inside and '"' not in inside.replace('""', "")


def _rows(path: Path, reader: Any, columns: Sequence[str] | None) -> Rows:
    return Rows(_read_table(path, reader, columns), Origin(str(path), "line"))


def _read_table(path: Path, reader: Any, columns: Sequence[str] | None) -> Iterator[NumberedRow]:
    """Yield the rows of a `csv.reader`. Columns are named by `columns` or by the first line."""
    begin = 1
    with _long_fields():
        try:
            header = next(reader, []) if columns is None else list(columns)
            if twice := [name for name in header if header.count(name) > 1]:
                raise UsageError(f"{path}, line 1: the column {twice[0]!r} stands twice; give each its own name")
            begin = reader.line_num + 1
            for fields in reader:
                # A quoted cell can hold line ends; the row is where it begins.
                number, begin = begin, reader.line_num + 1
                if not fields or (columns is not None and fields == header and number == 1):
                    continue
                if len(fields) != len(header):
                    raise _wrong_length(path, number, fields, header, is_named=columns is not None)
                yield number, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise UsageError(f"{path}, line {begin}: broken line ({_advice(error, path)})") from None


def _wrong_length(path: Path, number: int, fields: list[str], header: list[str], *, is_named: bool) -> UsageError:
    names = printable(", ".join(header))[:MOST_NAMES]
    return UsageError(
        f"{path}, line {number}: expected {len(header)} fields as in {'columns' if is_named else 'the first line'} "
        f"({names}), got {len(fields)}"
    )


def _advice(error: csv.Error, path: Path) -> str:
    said = str(error)
    if said.startswith("field larger"):
        return f"a cell of more than {LONGEST_FIELD:,} characters; is a quote sign left open?"
    if said.startswith("new-line character"):
        return (
            "a carriage return without a line feed; put the cell that holds it into quotes, or, if all lines end so, "
            f"convert the file: tr '\\r' '\\n' < {path.name} > lines{path.suffix}"
        )
    return f"{said}; is a quote sign left open?" if said == "unexpected end of data" else said


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let the csv module read cells of up to `LONGEST_FIELD` characters, instead of 131,072, and set it back.

    The limit belongs to the whole process: one thread at a time may change it.
    """
    with _limit_lock:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, LONGEST_FIELD))
        try:
            yield
        finally:
            csv.field_size_limit(before)
