"""Endings of the names of data files."""

from __future__ import annotations

from pathlib import Path

from .text_lines import COMPRESSIONS

TEXT_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
"""Endings of text files, which may also be compressed: `.jsonl.gz`."""

ENDINGS = (*TEXT_ENDINGS, ".parquet", ".arrow")
"""File name endings that `read_rows` reads."""


def ending_of(path: str | Path) -> str | None:
    """Return the ending in `ENDINGS` that a name has, also before that of a compressed file; None if it has none.

    Example:
        >>> ending_of("data/train.jsonl.gz"), ending_of("train.parquet"), ending_of("train.xlsx")
        ('.jsonl', '.parquet', None)
    """
    path = Path(path)
    last = path.suffix.lower()
    if last not in COMPRESSIONS:
        return last if last in ENDINGS else None
    inner = Path(path.stem).suffix.lower()
    return inner if inner in TEXT_ENDINGS else None


def whole_ending_of(path: str | Path) -> str:
    """Return the ending of a data file with that of its compression: ".jsonl.gz"."""
    path = Path(path)
    return "".join(path.suffixes[-2:]) if path.suffix.lower() in COMPRESSIONS else path.suffix
