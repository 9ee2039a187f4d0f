"""Tables of the page: figures as text. A column in which nothing is known is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from . import number_format as words
from .chart_style import Mark
from .methods import ratio


@dataclass(frozen=True)
class Cell:
    """One figure, with a detail in small letters."""

    text: str
    detail: str = ""
    is_strong: bool = False
    mark: Markup | None = None


@dataclass(frozen=True)
class Column:
    """A heading."""

    title: str
    unit: str = ""
    is_text: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under columns. The first cell of a row is its name."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def without_unknown(self) -> Table:
        """Return the table without the columns in which every cell is unknown."""
        known = [
            place
            for place, column in enumerate(self.columns)
            if column.is_text or any(row[place].text != words.UNKNOWN for row in self.rows)
        ]
        return Table(
            columns=tuple(self.columns[place] for place in known),
            rows=tuple(tuple(row[place] for place in known) for row in self.rows),
        )


class Namer:
    """Makes cells with the name and the mark of a method."""

    def __init__(self, marks: Mapping[str, Mark]) -> None:
        self._marks = {name: mark.svg() for name, mark in marks.items()}

    def __call__(self, name: str, detail: str = "") -> Cell:
        return Cell(name, detail, mark=self._marks.get(name))


def relative_cell(value: float | None, reference: float | None) -> Cell:
    """Return a cell with bytes, and below them their share of full fine-tuning."""
    relative = ratio(value, reference)
    return Cell(words.num_bytes(value), "" if relative is None else f"{words.share(relative)} of full")
