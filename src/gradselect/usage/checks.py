"""Checks of single settings. Each error names the setting, the value and what to write instead."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import SupportsFloat

from .errors import UsageError
from .names import as_tuple


def check_whole(name: str, value: object, *, least: int = 1) -> None:
    """Check that the setting `name` is an int of at least `least`.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name}={value!r} is not a whole number from {least} on; write e.g. {name}={least}")


def check_positive(name: str, value: object, *, at_most: float = math.inf, example: float) -> None:
    """Check that the setting `name` is a finite number in (0, at_most].

    Raises:
        UsageError: it is not.
    """
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (0 < number <= at_most and math.isfinite(number)):
        interval = "(0, inf)" if at_most == math.inf else f"(0, {at_most}]"
        raise UsageError(f"{name}={value!r} is outside {interval}; write e.g. {name}={example}")


def check_file_name(name: str, value: object, *, example: str) -> None:
    """Check that the setting `name` is the name of a file.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise UsageError(f"{name}={value!r} is no file name; write e.g. {name}={example!r}")


def check_one_of(name: str, value: object, options: Sequence[str]) -> None:
    """Check that the setting `name` is one of `options`.

    Raises:
        UsageError: it is not.
    """
    if value not in options:
        choices = " or ".join(f'{name}="{option}"' for option in options)
        raise UsageError(f"{name}={value!r} is unknown; write {choices}")


def check_patterns(name: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return block names and globs as a tuple; a single one may stand alone.

    Raises:
        UsageError: there is none, or something is no text.
    """
    if not patterns:
        raise UsageError(f'{name}={patterns!r} names no block; write e.g. {name}=("layer.*",)')
    if not isinstance(patterns, Sequence) or not all(isinstance(each, str) for each in patterns):
        raise UsageError(f'{name}={patterns!r} is no list of block names; write e.g. {name}=("layer.*",)')
    return as_tuple(patterns)


def check_hyper_parameters(*, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Check that every number is in its range.

    Raises:
        UsageError: one is not; names the first.
    """
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not is_number(value) or not value >= 0 or math.isinf(value):
            # YAML reads 1e-3, without a point, as text.
            advice = f"the default of {name} is a good start" if is_number(value) else f"write e.g. {name}=0.001"
            raise UsageError(f"{name}={value!r} must be a finite number >= 0; {advice}")
    pair = tuple(betas) if isinstance(betas, Sequence) else ()
    if len(pair) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in pair):
        raise UsageError(f"betas={betas!r} must be two numbers in [0, 1); write betas=(0.9, 0.999)")


def is_number(value: object) -> bool:
    """Return True for what counts as one number: an int or a float, a tensor or NumPy's number; False for text.

    Example:
        >>> is_number(1e-3), is_number("1e-3"), is_number(None)
        (True, False, False)
    """
    return isinstance(value, SupportsFloat) and not isinstance(value, bool)


def check_is(value: object, kind: type, *, name: str, example: str) -> None:
    """Check that an argument is an object of the right class, not the class itself or its name.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, kind):
        raise UsageError(f"{name}={value!r} is no {kind.__name__.removeprefix('Abstract')} object; write {example}")
