"""Text of libraries and files, made fit for one line of a message."""

from __future__ import annotations

from collections.abc import Collection


def first_line(error: Exception) -> str:
    """Return the first line of an error, printable."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])


def shortened(text: str, *, limit: int = 240) -> str:
    """Return a text as one printable line, without its middle if it is long.

    Args:
        text: the text.
        limit: characters that are left of a longer one.

    Example:
        >>> shortened("a\\nb"), shortened("0123456789", limit=4)
        ('a\\\\nb', '01 ... 6 characters ... 89')
    """
    text = text.strip()
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"
    return printable(text)


def listed(names: Collection[str], *, most: int = 12) -> str:
    """Return the first `most` names, and how many more there are.

    Example:
        >>> listed(["layer.0", "layer.1", "layer.2"], most=2)
        'layer.0, layer.1 and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(list(names)[:most]) + more


def printable(text: str) -> str:
    """Return the text with each character that cannot be shown, or moves the cursor, as its escape code."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
