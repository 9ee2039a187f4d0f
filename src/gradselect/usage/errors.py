"""The one error a user can cause."""

from __future__ import annotations


class UsageError(ValueError):
    """Something that the user can change is wrong. The message says what, the value, and what to write instead.

    The command line turns this error, and no other, into exit code 2.

    Example:
        >>> import gradselect as gs
        >>> gs.Cyclic(every=0)
        Traceback (most recent call last):
        ...
        gradselect.usage.errors.UsageError: every=0 is not a whole number ...; write e.g. every=1
    """
