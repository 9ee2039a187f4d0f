"""Warnings and log lines of the libraries: collected for a file, shown only where they are about missing weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ABOUT_WEIGHTS = re.compile(
    r"\b(missing|unexpected|mismatched|unused) (\w+ )?(keys?|weights?|tensors?|param\w*)\b"
    r"|\b(keys?|weights?|tensors?|param\w*)\b.{0,80}\b(missing|unexpected|mismatch\w*|not (used|loaded|found))\b"
    r"|not initiali[sz]ed|newly initiali[sz]ed|size mismatch|LOAD REPORT",
    re.IGNORECASE,
)
"""Wordings of torch, transformers and PEFT for weights that a checkpoint lacks, or that were not taken from it."""
_REPORT = re.compile(r"(\S+) +\| (MISSING|UNEXPECTED|MISMATCH|CONVERSION)\b")
"""A row of the table of transformers."""
_FOR_DEVELOPERS = re.compile(r"\b(Future|Deprecation|PendingDeprecation)Warning\b|\bdeprecated\b")
"""Announcements of changes to come. Every run causes some, and no user can do anything about them."""
_MOST_SHOWN = 600
"""Letters of such a message on the console; it may list every tensor."""


class _Collector(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(level=logging.WARNING)
        self.lines: list[str] = []
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("gradselect"):
            self._show(record.getMessage())
            return
        text = " ".join(_COLOUR.sub("", record.getMessage()).split())
        line = f"{record.levelname} {record.name}: {text}"
        # Libraries repeat a warning for every example or step.
        if line not in self.lines:
            self.lines.append(line)
            if _ABOUT_WEIGHTS.search(text):
                self._show(f"{record.name.partition('.')[0]}: {_shortened(text)}")

    def _show(self, text: str) -> None:
        self._console.print(f"note       {text}", highlight=False, markup=False, soft_wrap=True)


def _shortened(text: str) -> str:
    rows = _REPORT.findall(text)
    if rows:
        title = text.partition(" LOAD REPORT")[0]
        text = f"{title} is not as its checkpoint: {', '.join(f'{name} {status}' for name, status in rows)}"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} ... (all of it in messages.log)"


def describe_messages(messages: Sequence[str], file: Path) -> str | None:
    """Return a line about the libraries' messages in a file; None if none is meant for the user.

    Example:
        >>> describe_messages(["WARNING trl: the rows are long"], Path("run/messages.log"))
        '1 message from libraries in run/messages.log'
    """
    count = sum(_FOR_DEVELOPERS.search(message) is None for message in messages)
    return f"{count:,} message{'s' if count > 1 else ''} from libraries in {file}" if count else None


@contextmanager
def collected_messages(console: Console) -> Iterator[list[str]]:
    """Collect warnings and log lines of the libraries in a list that grows; switch their progress bars off.

    Messages of gradselect itself are shown on the console, and warnings about weights that were not loaded.
    """
    collector = _Collector(console)
    root = logging.getLogger()
    root.addHandler(collector)
    logging.captureWarnings(True)
    try:
        with _quiet_transformers(), _quiet_datasets():
            yield collector.lines
    finally:
        logging.captureWarnings(False)
        root.removeHandler(collector)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as settings

    bars = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    settings.disable_default_handler()
    settings.enable_propagation()
    try:
        yield
    finally:
        settings.disable_propagation()
        settings.enable_default_handler()
        if bars:
            settings.enable_progress_bar()


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
