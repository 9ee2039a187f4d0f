"""Stages of a run: what it is doing now, how far it is, and how long that will take."""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

FIRST_LINE_SECONDS = 2.0
"""A stage that ends sooner leaves no plain line."""

LINE_SECONDS = 10.0
LONGEST_LINE_SECONDS = 60.0
BAR_WIDTH = 20
REFRESHES = 4
"""Pictures of the live lines in a second; a sign before the innermost stage turns with them."""

Item = TypeVar("Item")


class Stage:
    """Work in progress.

    Args:
        what: what is being done, "loading the model".
        total: number of items, if it is known.
        first_line_seconds: seconds before its first plain line.
        seconds: returns the time in seconds, as `time.monotonic`.

    Attributes:
        done: items done.
        note: text behind the numbers.
        left: text of the time left; None: it is worked out from the items.
    """

    def __init__(
        self,
        what: str,
        *,
        total: int | None = None,
        first_line_seconds: float = FIRST_LINE_SECONDS,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self.note = ""
        self.left: str | None = None
        self._seconds = seconds
        self._begun = self._counted_from = seconds()
        self._done_before = 0
        self._line_due = self._begun + first_line_seconds

    def advance(self, count: int = 1) -> None:
        """Count items as done."""
        self.done += count

    def become(self, what: str, *, total: int | None = None, done: int = 0) -> None:
        """Go on with other work, of which some may be done."""
        self.what, self.total, self.done = what, total, done
        self._counted_from, self._done_before = self._seconds(), done

    def count(self, items: Collection[Item]) -> Iterator[Item]:
        """Yield the items and count each one as done when the next is asked for."""
        self.total = len(items)
        for item in items:
            yield item
            self.advance()

    def time_left(self) -> str:
        """Return "about 2:09 left", or the time so far, "0:12", while nothing is known about the rest."""
        if self.left is not None:
            return self.left
        now = self._seconds()
        done = self.done - self._done_before
        if self.total and done > 0:
            return f"about {clock((now - self._counted_from) * max(0, self.total - self.done) / done)} left"
        return clock(now - self._begun)

    def numbers(self) -> str:
        """Return "12/149"; nothing if there is no total."""
        return f"{self.done:,}/{self.total:,}" if self.total else ""

    def line(self) -> str:
        """Return the plain line."""
        words = (self.what, self.numbers(), self.time_left(), self.note)
        return "progress   " + "  ".join(word for word in words if word)

    def is_line_due(self) -> bool:
        """Return True if it is time for a plain line."""
        return self._seconds() >= self._line_due

    def line_is_shown(self) -> None:
        """Set the time of the next plain line. The longer the stage, the fewer."""
        now = self._seconds()
        self._line_due = now + min(LONGEST_LINE_SECONDS, max(LINE_SECONDS, (now - self._begun) / 5))


def clock(seconds: float) -> str:
    """Return "0:12", "2:09" or "1:02:09"."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def encodable(text: str, console: Console) -> str:
    """Return the text with characters that the console's encoding lacks as escape codes: data may hold any."""
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)


def fitted(line: str, console: Console, *, indent: int) -> str:
    """Return a line in whole words as wide as the terminal; what is wrapped stands `indent` columns to the right.

    In a file or a pipe a line stays one line.
    """
    if not console.is_terminal or len(line) <= console.width:
        return line
    return "\n".join(
        textwrap.wrap(
            line,
            max(console.width, indent + 20),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
            break_long_words=False,
        )
    )


class Stages:
    """Shows the stages that are open: in a terminal as live lines below everything else, elsewhere as plain lines.

    A plain line comes two seconds after a stage has begun, then every 10 seconds, after a while every minute; it holds
    no control characters. Nothing is shown on a quiet console.

    Args:
        console: where to show them. Other lines that are printed on it stand above the live lines.

    Example:
        >>> stages = Stages(Console(quiet=True))
        >>> with stages.open("tokenizing", total=3) as stage:
        ...     stage.advance()
        >>> stage.numbers()
        '1/3'
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._open: list[Stage] = []
        self._live: Live | None = None
        self._ticker: _Ticker | None = None

    @contextmanager
    def open(
        self, what: str, *, total: int | None = None, first_line_seconds: float = FIRST_LINE_SECONDS
    ) -> Iterator[Stage]:
        """Show a stage until the end of the block.

        Args:
            what: what is being done, "loading the model".
            total: number of items, if it is known.
            first_line_seconds: seconds before its first plain line.
        """
        stage = Stage(what, total=total, first_line_seconds=first_line_seconds)
        self._open.append(stage)
        try:
            self._start()
            yield stage
        finally:
            # Before the stage is gone, so that the last picture shows where it ended.
            if self._open == [stage]:
                self._stop()
            self._open.remove(stage)

    def say(self, *lines: str) -> None:
        """Print lines as they are, above the live lines. The next plain line waits its turn."""
        for line in lines:
            line = encodable(line, self.console)
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        for stage in self._open:
            stage.line_is_shown()

    def _start(self) -> None:
        if self.console.quiet or self._live is not None or self._ticker is not None:
            return
        if self.console.is_interactive:
            self._live = Live(
                get_renderable=self._drawn, console=self.console, transient=True, refresh_per_second=REFRESHES
            )
            self._live.start(refresh=True)
        else:
            self._ticker = _Ticker(self._show_due)

    def _stop(self) -> None:
        live, self._live = self._live, None
        ticker, self._ticker = self._ticker, None
        if live is not None:
            live.stop()
        if ticker is not None:
            ticker.stop()

    def _show_due(self) -> None:
        """Print a plain line of the innermost stage if one is due."""
        for stage in self._open[-1:]:
            if stage.is_line_due():
                self.say(stage.line())

    def _drawn(self) -> RenderableType:
        """Return one line for each open stage, cut to the width of the terminal."""
        return Group(*(self._line_of(stage) for stage in [*self._open]))

    def _line_of(self, stage: Stage) -> Text:
        ascii_only = self.console.options.ascii_only
        frames = "-\\|/" if ascii_only else "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
        sign = frames[int(time.monotonic() * REFRESHES) % len(frames)] if stage is self._open[-1] else " "
        line = Text(f"{sign} {stage.what}", no_wrap=True, overflow="ellipsis")
        if stage.total:
            done = min(BAR_WIDTH, BAR_WIDTH * stage.done // stage.total)
            full = "#" if ascii_only else "━"
            line.append("  ").append(full * done, style="bar.complete")
            # Without colours the rest would look like the part that is done.
            rest = " " if self.console.color_system is None or self.console.no_color else full
            line.append(rest * (BAR_WIDTH - done), style="bar.back").append(f" {stage.numbers()}")
        for words in (stage.time_left(), stage.note):
            line.append(f"  {words}" if words else "")
        return line


class _Ticker:
    """Calls a function twice a second in a thread of its own."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self, function: Callable[[], None]) -> None:
        while not self._ends.wait(0.5):
            function()


SILENT = Stages(Console(quiet=True))
"""Shows nothing."""
