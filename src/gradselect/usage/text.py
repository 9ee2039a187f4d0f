"""Text of libraries and files, made fit for one line of a message."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """Return the first line of an error, printable."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def printable(text: str) -> str:
    """Return the text with each character that cannot be shown, or moves the cursor, as its escape code."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
