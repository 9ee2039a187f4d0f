"""The command line: `gradselect train | evaluate | compare | report | tune | plan | delta`."""

from .command_line import main

__all__ = ["main"]
