"""The one error a user can cause."""

from __future__ import annotations


class UsageError(ValueError):
    """Something the user can change is wrong: the message says what, the value got, and what to write instead.

    A `ValueError`, so a library user catches it as one; the command line turns it, and nothing else, into exit code 2.
    """
