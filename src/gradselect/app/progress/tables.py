"""Tables for a console of any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

GAP = 2
MOST_OF_A_NAME = 32
"""Characters of a row's name in one line. Longer ones are folded."""


def print_table(console: Console, heading: str, rows: Mapping[str, Mapping[str, str]], *, title: str = "") -> None:
    """Print a row for each entry, in as many tables as the width of the console needs.

    Figures are never cut: columns that do not fit go into a further table, which repeats the names of the rows.

    Args:
        console: where to print.
        heading: of the names.
        rows: the figures of each row by the heading of their column, by the name of the row. All have the same columns.
        title: line above the tables.

    Example:
        >>> rows = {"full": {"steps": "36", "loss": "0.419"}, "lora": {"steps": "40", "loss": "0.409"}}
        >>> print_table(Console(width=14), "method", rows)
        method  steps
        full       36
        lora       40
        <BLANKLINE>
        method   loss
        full    0.419
        lora    0.409
        <BLANKLINE>
    """
    width = min(MOST_OF_A_NAME, max(map(len, [heading, *rows])))
    columns = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    if title:
        console.print(title, highlight=False, markup=False)
    for part in _parts([*rows.values()], columns, room=console.width - width - GAP):
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
        table.add_column(heading, overflow="fold", max_width=width, min_width=min(width, console.width // 3))
        for name in part:
            table.add_column(name, justify="right", no_wrap=True)
        for name, figures in rows.items():
            table.add_row(name, *(figures[column] for column in part))
        console.print(table, highlight=False)
        console.print()


def _parts(rows: Sequence[Mapping[str, str]], columns: Sequence[str], *, room: int) -> list[list[str]]:
    """Divide the columns among tables that fit into `room` characters beside the names."""
    parts: list[list[str]] = [[]]
    used = 0
    for name in columns:
        width = GAP + max(map(len, [name, *(row[name] for row in rows)]))
        if used + width > room and parts[-1]:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += width
    return parts
