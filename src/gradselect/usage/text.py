"""What libraries and files say, in a form that can be shown in one line."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """The first line of a library's error, without what follows."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def printable(text: str) -> str:
    """`text` with each sign that cannot be shown, or would move the cursor, written by its number."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
