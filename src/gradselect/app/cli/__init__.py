"""The command line: `gradselect train | evaluate | compare | report | tune | plan | delta`."""

from .entry import main

__all__ = ["main"]
