"""Rows of a local data file. Every error names the file and, where there is one, the line.

Not by `datasets`: it changes values ("007" to 7) and accepts broken files; LOG.md has the cases.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gradselect import UsageError
from gradselect.app.runtime import machine_bytes
from gradselect.usage import first_line, printable

Row = dict[str, Any]
"""One example: a value per column."""

LONGEST_LINE = 2**26
"""Bytes of a line. A book has a sixtieth of it; a file without line ends should not be read to its end."""

LONGEST_LIST = 500
"""Characters of the column names that an error shows."""

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def read_rows(path: str | Path, *, columns: Sequence[str] | None = None) -> list[Row]:
    """Return all rows of a `.jsonl`, `.json`, `.parquet`, `.csv`, `.tsv` or `.txt` file, in order.

    JSON holds one list of objects; JSONL one object a line; CSV and TSV name their columns in the first line; TXT gives
    one row with the column `text` per line. Empty lines of JSONL and TXT are skipped. Text is UTF-8. In a TSV file a
    quote sign is a character like any other.

    Args:
        path: the file.
        columns: names of the columns of a CSV or TSV file without a header. A first line that is just these names is
            skipped.

    Raises:
        UsageError: no such file, an unknown ending, no rows, or a line that cannot be read; names file and line.

    Example:
        >>> read_rows("train.jsonl")[0]
        {'question': 'How many is 2 + 3?', 'answer': '2 + 3 = 5\\n#### 5'}
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path}: cannot read files ending in {path.suffix!r}; use one of {', '.join(ENDINGS)}")
    if columns is not None and reader not in (_read_csv, _read_tsv):
        raise UsageError(f"columns={list(columns)} is for .csv and .tsv files; {path} has its own names: leave it out")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; paths are relative to the folder the command runs in")
    rows = list(reader(path) if columns is None else reader(path, columns))
    if not rows:
        raise UsageError(f"{path}: the file holds no rows; give a file with at least one example")
    return rows


def require_columns(rows: Sequence[Row], columns: Sequence[str], *, path: str | Path) -> None:
    """Check that every row of the file at `path` has all `columns`.

    Raises:
        UsageError: names the file, the first row (from 1) that lacks one, and the columns of that row.
    """
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if column not in row]
        if missing:
            there = printable(", ".join(map(str, row)))[:LONGEST_LIST] or "none"
            raise UsageError(f"{path}: row {number} has no column {missing[0]!r}; its columns are: {there}")


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            item = _parse(line.rstrip(), path=path, first_line=number)
            yield _object(item, where=f"{path}, line {number}", is_escaped="\\u" in line)


def _read_json(path: Path) -> Iterator[Row]:
    text = "".join(_lines(path, is_one_text=True))
    items = _parse(text, path=path, first_line=1) if text.strip() else []
    if not isinstance(items, list):
        raise UsageError(
            f"{path}: expected a list of objects, got {_kind(items)}; "
            f"write [{{...}}, ...], or one object a line in a file that ends in .jsonl"
        )
    is_escaped = "\\u" in text
    for number, item in enumerate(items, start=1):
        yield _object(item, where=f"{path}, item {number} of the list", is_escaped=is_escaped)


def _read_csv(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    return _read_table(path, csv.reader(_lines(path), strict=True), columns)


def _read_tsv(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    # Fields of a TSV hold no tabs and no line ends, so a quote sign is a character like any other.
    return _read_table(path, csv.reader(_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE), columns)


def _read_txt(path: Path) -> Iterator[Row]:
    return ({"text": line.rstrip("\r\n")} for line in _lines(path) if line.strip())


def _read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    try:
        _check_unpacked_size(path, parquet.read_metadata(path))
        yield from parquet.read_table(path).to_pylist()
    # Damaged bytes can also give invalid UTF-8, and sizes and dates outside of Python's range.
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: not a readable Parquet file ({first_line(error)})") from None


_READERS: dict[str, Callable[..., Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_txt,
}

ENDINGS = tuple(_READERS)
"""File name endings that `read_rows` reads."""


def _read_table(path: Path, lines: Any, columns: Sequence[str] | None) -> Iterator[Row]:
    """Yield the rows of a `csv.reader`. Columns are named by `columns` or by the first line."""
    try:
        header = next(lines, []) if columns is None else list(columns)
        if twice := [name for name in header if header.count(name) > 1]:
            raise UsageError(f"{path}, line 1: the column {twice[0]!r} stands twice; give each its own name")
        for fields in lines:
            if not fields or (columns is not None and fields == header and lines.line_num == 1):
                continue
            if len(fields) != len(header):
                where = "the first line" if columns is None else "columns"
                names = printable(", ".join(header))[:LONGEST_LIST]
                raise UsageError(
                    f"{path}, line {lines.line_num}: expected {len(header)} fields as in {where} ({names}), got "
                    f"{len(fields)}"
                )
            yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UsageError(f"{path}, line {lines.line_num}: broken line ({error})") from None


def _check_unpacked_size(path: Path, metadata: Any) -> None:
    """Check the size before reading: a few bytes of Parquet can stand for any number of equal values."""
    unpacked = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    # Even an empty value takes a pointer in Python.
    unpacked = max(unpacked, 8 * metadata.num_rows * metadata.num_columns)
    if unpacked > machine_bytes():
        raise UsageError(
            f"{path}: its {metadata.num_rows:,} rows are {unpacked / 2**30:,.0f} GiB when they are unpacked, more than "
            "this machine holds; give a smaller file"
        )


def _lines(path: Path, *, is_one_text: bool = False) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends. Bytes are split first, so that a bad byte has a line number.

    With `is_one_text` the length of a line is not limited.
    """
    longest = -1 if is_one_text else LONGEST_LINE + 1
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(longest), b""), start=1):
            if len(line) == longest:
                raise UsageError(
                    f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes; is this text, with one example a line?"
                )
            try:
                # A byte order mark, as spreadsheets write it, is no part of the first column's name.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                is_utf16 = number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
                raise UsageError(
                    f"{path}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}); "
                    f"convert the file, e.g. iconv -f {'UTF-16' if is_utf16 else 'LATIN1'} -t UTF-8 {path.name} "
                    f"> utf8{path.suffix}"
                ) from None
            if "\0" in text:
                raise UsageError(
                    f"{path}, line {number}: a zero byte at column {text.index(chr(0)) + 1}: the file is damaged or no "
                    f"UTF-8; convert it, e.g. iconv -f UTF-16 -t UTF-8 {path.name} > utf8{path.suffix}"
                )
            yield text


def _parse(text: str, *, path: Path, first_line: int) -> Any:
    """Parse JSON text that begins at line `first_line` of the file at `path`."""
    where = str(path) if "\n" in text.strip() else f"{path}, line {first_line}"
    try:
        # With the line end, the error of a text that ends too early would name the next line.
        return json.loads(text.rstrip("\r\n"), object_pairs_hook=_without_doubles)
    except _KeyTwiceError as error:
        raise UsageError(f"{where}: the key {error.args[0]!r:.60} stands twice in one object") from None
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UsageError(f"{path}, line {line}: broken JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise UsageError(f"{where}: JSON with too many brackets inside one another") from None
    except ValueError:  # Python reads whole numbers of up to 4,300 digits
        raise UsageError(f"{where}: a number with thousands of digits; write it as a text, in quotes") from None


class _KeyTwiceError(Exception):
    """A key stands twice in one object; the argument is the key."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> Row:
    """Return a JSON object. Python would silently take the last of equal keys."""
    item = dict(pairs)
    if len(item) < len(pairs):
        raise _KeyTwiceError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return item


def _object(item: Any, *, where: str, is_escaped: bool) -> Row:
    """Return the item if it is an object; `is_escaped`: its text has \\u escapes, and must be checked for halves."""
    if not isinstance(item, dict):
        raise UsageError(f'{where}: expected an object like {{"question": ..., "answer": ...}}, got {_kind(item)}')
    if is_escaped and _HALF_CHARACTER.search(json.dumps(item, ensure_ascii=False)):
        raise UsageError(f"{where}: half of a character (\\ud800 to \\udfff without its other half), which no text has")
    return item


def _kind(item: Any) -> str:
    """Describe a JSON value: its type and its beginning."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    text = json.dumps(item, ensure_ascii=False)
    # Characters that cannot be shown become escape codes.
    text = text if text[:40].isprintable() else json.dumps(item)
    return f"{names.get(type(item), 'a number')}: {text[:40]}{'...' if len(text) > 40 else ''}"
