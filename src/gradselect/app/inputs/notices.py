"""Facts about rows, counted while they are read, for the user."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Notices:
    """Counts rows by fact.

    Args:
        rows: rows of each fact, from 1: "end with a message of another role than the assistant".
    """

    rows: dict[str, list[int]] = field(default_factory=dict)

    def add(self, facts: str | Iterable[str], row: int) -> None:
        """Note that each of the facts holds for a row, counted from 1."""
        for fact in {facts} if isinstance(facts, str) else set(facts):
            self.rows.setdefault(fact, []).append(row)

    def lines(self, total: int, *, what: str, where: str) -> tuple[str, ...]:
        """Return a line for each fact.

        Example:
            >>> notices = Notices()
            >>> notices.add("have no answer and are left out", 3)
            >>> notices.lines(40, what="conversations", where="")
            ('1 of 40 conversations have no answer and are left out (the first in row 3)',)
        """
        return tuple(
            f"{len(rows):,} of {total:,} {what}{where} {fact} (the first in row {rows[0]:,})"
            for fact, rows in self.rows.items()
        )
