"""Facts about rows, counted while they are read, for the user."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gradselect import UsageError

NameRow = Callable[[int], str]
"""Gives the place of a row, counted from 1, for messages: "train.jsonl, line 17"."""


class RowError(UsageError):
    """A row that cannot be used.

    Args:
        row: its number, from 1.
        reason: what is wrong with it, and what to do.
    """

    def __init__(self, row: int, reason: object) -> None:
        super().__init__(f"row {row}: {reason}")
        self.row, self.reason = row, reason

    def at(self, name_row: NameRow) -> UsageError:
        """Return the error with the place of the row."""
        return UsageError(f"{name_row(self.row)}: {self.reason}")


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

    def lines(self, total: int, *, what: str, name_row: NameRow) -> tuple[str, ...]:
        """Return a line for each fact.

        Example:
            >>> notices = Notices()
            >>> notices.add("have no answer and are left out", 3)
            >>> notices.lines(40, what="conversations", name_row="chat.jsonl, line {}".format)
            ('1 of 40 conversations have no answer and are left out; the first: chat.jsonl, line 3',)
        """
        return tuple(
            f"{len(set(rows)):,} of {total:,} {what} {fact}; the first: {name_row(rows[0])}"
            for fact, rows in self.rows.items()
        )
