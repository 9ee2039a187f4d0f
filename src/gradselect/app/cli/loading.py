"""Say that libraries are being loaded, before anything slow is imported."""

from __future__ import annotations

import os

from rich.console import Console

from gradselect.app.progress import Stages

LOADING = "loading libraries"


def command_stages(*, stderr: bool = False) -> Stages:
    """Return the stages of a command, which one process of several shows.

    Args:
        stderr: show them on standard error, where standard output is a result that others read.
    """
    return Stages(Console(stderr=stderr, quiet=os.environ.get("RANK", "0") != "0"))
