"""Rows with their places in files, so that an error can name the line."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, SupportsIndex, overload

Row = dict[str, Any]
"""One example: a value per column."""

NumberedRow = tuple[int, Row]
"""A row and its number in the file, from 1. Lines that hold no row are counted too."""


class Origin(NamedTuple):
    """A file of rows, and the unit that they are counted in.

    Args:
        path: name of the file or data set, as in messages.
        unit: "line", "row", or "item of the list".
    """

    path: str
    unit: str = "row"


NOWHERE = Origin("rows")


class Rows(list[Row]):
    """A list of rows that knows the place of each. It equals the plain list, and its slices know their places too.

    The places lie beside the rows, 12 bytes each: rows of a class of their own would make every collection of garbage
    walk over them, which doubled the time to read a file.
    """

    def __init__(self, numbered: Iterable[NumberedRow] = (), origin: Origin = NOWHERE) -> None:
        super().__init__()
        self._origins = [origin]
        self._numbers, self._origin_of = array("Q"), array("I")
        append, append_number = self.append, self._numbers.append
        for number, row in numbered:
            append_number(number)
            append(row)
        self._origin_of.extend([0] * len(self))

    @overload
    def __getitem__(self, index: SupportsIndex) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Row | Rows:
        return self.take(range(len(self))[index]) if isinstance(index, slice) else super().__getitem__(index)

    @property
    def fills_with_nulls(self) -> bool:
        """True for tables (Parquet, Arrow, data sets on the hub): there, a key that an object lacks is null."""
        return all(origin.unit == "row" for origin in self._origins)

    @classmethod
    def counted(cls, rows: Iterable[Row], origin: Origin) -> Rows:
        """Return rows whose places are their numbers from 1."""
        return cls(enumerate(rows, start=1), origin)

    def take(self, indices: Sequence[int]) -> Rows:
        """Return the rows at `indices` with their places."""
        taken = Rows()
        taken._origins = self._origins
        taken.extend([super(Rows, self).__getitem__(index) for index in indices])
        taken._numbers.extend(self._numbers[index] for index in indices)
        taken._origin_of.extend(self._origin_of[index] for index in indices)
        return taken

    def map(self, change: Callable[[Row], Row]) -> Rows:
        """Return a changed row at the place of each."""
        changed = self.take(range(len(self)))
        changed[:] = map(change, self)
        return changed

    def add(self, other: Rows) -> Self:
        """Append the rows of another file."""
        first = len(self._origins)
        self._origins = [*self._origins, *other._origins]
        self._origin_of.extend(first + number for number in other._origin_of)
        self._numbers.extend(other._numbers)
        self.extend(other)
        return self

    def place(self, index: int) -> str:
        """Return the place of a row for messages: "train.jsonl, line 17"."""
        origin = self._origins[self._origin_of[index]]
        unit, _, of = origin.unit.partition(" ")
        return f"{origin.path}, {unit} {self._numbers[index]}{of and f' {of}'}"


def place_of(rows: Sequence[Row], index: int, *, path: str | Path) -> str:
    """Return the place of the row at `index`: file and line, or `path` and the row's number if no more is known."""
    return rows.place(index) if isinstance(rows, Rows) else f"{path}: row {index + 1}"
