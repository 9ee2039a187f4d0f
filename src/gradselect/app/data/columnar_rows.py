"""Rows of Parquet and Arrow files, which store one column after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradselect.app.runtime import machine_bytes
from gradselect.usage import UsageError, first_line

from .row import Origin, Row, Rows

if TYPE_CHECKING:
    from pyarrow import Table


def read_parquet(path: Path) -> Rows:
    """Return the rows of a Parquet file. Structs and maps become dicts, lists stay lists."""
    return _read(path, "Parquet", _parquet_table)


def read_arrow(path: Path) -> Rows:
    """Return the rows of an Arrow file: the stream that `Dataset.save_to_disk` writes, or Feather."""
    return _read(path, "Arrow", _arrow_table)


def _read(path: Path, kind: str, read_table: Callable[[Path], Table]) -> Rows:
    from pyarrow import ArrowException

    try:
        items = _items(read_table(path))
        return Rows.counted(items, Origin(str(path)))
    except KeyError as error:
        raise UsageError(f"{path}: a map holds a key twice ({first_line(error)}); give each its own") from None
    # Damaged bytes can also give invalid UTF-8, and sizes and dates outside of Python's range.
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: not a readable {kind} file ({first_line(error)})") from None


def _items(table: Table) -> list[Row]:
    # With the argument every value takes twice as long.
    has_maps = any("map<" in str(field.type) for field in table.schema)
    return table.to_pylist(maps_as_pydicts="strict") if has_maps else table.to_pylist()


def _parquet_table(path: Path) -> Table:
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    unpacked = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    _check_unpacked_size(path, metadata.num_rows, metadata.num_columns, unpacked)
    return parquet.read_table(path)


def _arrow_table(path: Path) -> Table:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        try:
            table = pyarrow.ipc.open_stream(file).read_all()
        except pyarrow.ArrowInvalid:  # with a footer, as Feather has one
            table = pyarrow.ipc.open_file(file).read_all()
    _check_unpacked_size(path, table.num_rows, table.num_columns, table.nbytes)
    return table


def _check_unpacked_size(path: Path, num_rows: int, num_columns: int, num_bytes: Any) -> None:
    """Check the size before rows are made: a few bytes of Parquet can stand for any number of equal values."""
    # Even an empty value takes a pointer in Python.
    unpacked = max(num_bytes, 8 * num_rows * num_columns)
    if unpacked > machine_bytes():
        raise UsageError(
            f"{path}: its {num_rows:,} rows are {unpacked / 2**30:,.0f} GiB when they are unpacked, more than "
            "this machine holds; give a smaller file"
        )
