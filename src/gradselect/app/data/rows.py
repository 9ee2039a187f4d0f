"""Rows of local data files. Every error names the file and, where there is one, the line.

Not by `datasets`: it changes values ("007" to 7) and accepts broken files; LOG.md has the cases.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gradselect.files import check_no_pointer
from gradselect.usage import UsageError, printable

from .columnar_rows import read_arrow, read_parquet
from .endings import ENDINGS, ending_of
from .json_rows import MOST_NAMES, read_json, read_jsonl
from .row import NumberedRow, Origin, Row, Rows, place_of
from .shards import describe_files, files_of
from .table_rows import read_csv, read_tsv
from .text_lines import COMPRESSIONS, lines

_log = logging.getLogger(__name__)


def read_rows(
    path: str | Path,
    *,
    columns: Sequence[str] | None = None,
    rows_key: str | None = None,
    splits: Sequence[str] = ("train",),
    needs_split: bool = False,
) -> Rows:
    """Return all rows of a file, of the files in a folder, or of those that match a pattern, in order.

    JSON holds one list of objects, an object with such a list under a key, or one object a line; JSONL one object a
    line; CSV and TSV name their columns in the first line; TXT gives one row with the column `text` per line. Empty
    lines of JSONL and TXT are skipped. Text is UTF-8, plain or compressed (`.jsonl.gz`, `.zst`, `.bz2`, `.xz`). In a
    TSV file a quote sign is a character like any other. docs/data.md has the table.

    Args:
        path: the file, folder or pattern.
        columns: names of the columns of a CSV or TSV file without a header. A first line that is just these names is
            skipped.
        rows_key: key of the rows in a JSON file that holds one object, "data" or "data.train". Default: the only list
            of objects.
        splits: for a folder with the files of several splits: the first of these that it has is read.
        needs_split: a folder whose files are of no split is refused.

    Raises:
        UsageError: no such file, an unknown ending, no rows, or a line that cannot be read; names file and line.

    Example:
        >>> read_rows("train.jsonl")[0]
        {'question': 'How many is 2 + 3?', 'answer': '2 + 3 = 5\\n#### 5'}
    """
    files = files_of(path, splits, needs_split=needs_split)
    rows = _read_file(files[0], columns=columns, rows_key=rows_key)
    for file in files[1:]:
        rows.add(_read_file(file, columns=columns, rows_key=rows_key))
    if not rows:
        what = "the file holds" if len(files) == 1 else f"the {len(files):,} files hold"
        raise UsageError(f"{path}: {what} no rows; give a file with at least one example")
    if files != [Path(path)]:
        _log.warning("%s: read %s rows from %s", path, f"{len(rows):,}", describe_files(path, files))
    return rows


def _read_file(path: Path, *, columns: Sequence[str] | None, rows_key: str | None) -> Rows:
    ending = ending_of(path)
    if ending is None:
        known = f"{', '.join(ENDINGS)}, text files also with {', '.join(COMPRESSIONS)} after it"
        raise UsageError(f"{path}: cannot read files ending in {''.join(path.suffixes[-2:])!r}; use one of {known}")
    if columns is not None and ending not in (".csv", ".tsv"):
        raise UsageError(f"columns={list(columns)} is for .csv and .tsv files; {path} has its own names: leave it out")
    if rows_key is not None and ending != ".json":
        raise UsageError(f"data.rows_key={rows_key!r} is for .json files; {path} has rows of its own: leave it out")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; paths are relative to the folder the command runs in")
    check_no_pointer(path)
    options = {"columns": columns} if columns is not None else {"rows_key": rows_key} if rows_key is not None else {}
    return _READERS[ending](path, **options)


def require_columns(rows: Sequence[Row], columns: Sequence[str], *, path: str | Path) -> None:
    """Check that every row of the file at `path` has all `columns`.

    Raises:
        UsageError: names the file, the first row that lacks one, and the columns of that row.
    """
    for index, row in enumerate(rows):
        missing = [column for column in columns if column not in row]
        if missing:
            where = place_of(rows, index, path=path)
            raise UsageError(
                f"{where} has no column {missing[0]!r}; its columns are: {shown_columns([*row])}{other_sign([*row])}"
            )


def shown_columns(columns: Sequence[str]) -> str:
    """Return the names of columns for a message. Blanks around a name, and a name of nothing, stand in quotes."""
    names = (name if name and name == name.strip() else repr(name) for name in map(str, columns))
    return printable(", ".join(names))[:MOST_NAMES] or "none"


def other_sign(columns: Sequence[str]) -> str:
    """Return advice if the only column of a table looks like several columns with another sign between them."""
    name = columns[0] if len(columns) == 1 else ""
    signs = {"\t": "tabs; let the name of the file end in .tsv", ";": "semicolons; save it with commas, or as .tsv"}
    return next((f" (separated by {advice}?)" for sign, advice in signs.items() if sign in name), "")


def _read_txt(path: Path) -> Rows:
    return Rows(_texts(path), Origin(str(path), "line"))


def _texts(path: Path) -> Iterator[NumberedRow]:
    for number, line in enumerate(lines(path), start=1):
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}


_READERS: dict[str, Callable[..., Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": _read_txt,
}
