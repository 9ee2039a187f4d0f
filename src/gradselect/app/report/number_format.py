"""Numbers as text for people. A number that is unknown or not finite is a dash."""

from __future__ import annotations

import math

UNKNOWN = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NO-BREAK SPACE}"


def number(value: float | None, *, digits: int = 3, sign: bool = False) -> str:
    """Fixed digits after the point, with a true minus sign."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    # Zero has no sign.
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def significant(value: float | None) -> str:
    """Three significant digits, without exponent, with commas for thousands."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def seconds(value: float | None) -> str:
    """Seconds in a fitting unit: "412 ms", "1.25 s", "3.20 min", "1.41 h"."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if value >= size * (2 if unit in ("min", "h") else 1):
            return f"{significant(value / size)}{SPACE}{unit}"
    return f"{significant(value * 1000)}{SPACE}ms"


def num_bytes(value: float | None) -> str:
    """Bytes in decimal units: "54.3 MB"."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{significant(value / size)}{SPACE}{unit}"
    return f"{value:.0f}{SPACE}B"


def share(value: float | None, *, digits: int = 0) -> str:
    """Share in percent: "45 %"."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{number(100 * value, digits=digits)}{SPACE}%"


def times(value: float | None) -> str:
    """Factor: "1.43×"."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{number(value, digits=2)}{TIMES}"


def rate(value: float) -> str:
    """Learning rate: "3e-4"."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def probability(value: float) -> str:
    """P-value: "0.031", "< 0.001"."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def plural(count: int, word: str) -> str:
    """Count and word: "1 run", "3 runs"."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def upper_first(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def joined(words: list[str]) -> str:
    """Words as a list: "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
