"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

from .errors import UsageError

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def read_size(text: str) -> int:
    """Return the bytes that "12GiB", "800 MB" or "1.5e9" stands for.

    Raises:
        UsageError: the text is no size above 0.

    Example:
        >>> read_size("1.5 KiB")
        1536
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    unit = UNITS.get(match[2].upper()) if match else None
    try:
        size = 0 if match is None or unit is None else int(float(match[1]) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"{text!r} is no size; write a number above 0 and a unit, e.g. 12GiB, 800MB")
    return size


def write_size(num_bytes: int) -> str:
    """Return the size as text, in the largest binary unit that it fills at least once.

    Example:
        >>> write_size(1536), write_size(0)
        ('1.50 KiB', '0')
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes >= UNITS[unit.upper()]:
            number = num_bytes / UNITS[unit.upper()]
            return f"{number:.2f} {unit}" if number < 100 else f"{number:.0f} {unit}"
    return f"{num_bytes} B" if num_bytes else "0"


def smallest_text(num_bytes: int) -> str:
    """Return the size as text to type, rounded up."""
    unit = "GiB" if num_bytes >= UNITS["GIB"] else "MiB" if num_bytes >= UNITS["MIB"] else "KiB"
    hundredths = -(-num_bytes * 100 // UNITS[unit.upper()])
    return f"{hundredths / 100:g}{unit}"


def read_fractions(text: str) -> tuple[float, ...]:
    """Return the shares in "0.1,0.2".

    Raises:
        UsageError: one of them is not in (0, 1].
    """
    try:
        fractions = tuple(float(part) for part in text.split(","))
    except ValueError:
        fractions = ()
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise UsageError(f"fractions={text!r}: write numbers above 0 and at most 1 with commas, e.g. 0.1,0.2,0.3")
    return fractions
