"""Standard output of commands that print data."""

from __future__ import annotations

import io
import sys


def accept_any_text() -> None:
    """Write characters that the terminal's encoding lacks as their escape codes: data may hold any."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
