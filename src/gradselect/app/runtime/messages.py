"""Warnings and log lines of the libraries: collected for a file instead of shown."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


class _Collector(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(level=logging.WARNING)
        self.lines: list[str] = []
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("gradselect"):
            self._console.print(f"note       {record.getMessage()}", highlight=False, markup=False, soft_wrap=True)
            return
        line = f"{record.levelname} {record.name}: {' '.join(record.getMessage().split())}"
        # Libraries repeat a warning for every example or step.
        if line not in self.lines:
            self.lines.append(line)


@contextmanager
def collected_messages(console: Console) -> Iterator[list[str]]:
    """Collect warnings and log lines of the libraries in a list that grows; switch their progress bars off.

    Messages of gradselect itself are shown on the console.
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
