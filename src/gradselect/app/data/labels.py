"""Labels and scores: from the values in a file to the targets of a head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from gradselect import UsageError

MOST_LABELS = 1000
"""More values than this are no classes; the largest common sets have a few hundred."""


def label_names(values: Iterable[Any], *, path: str) -> tuple[str, ...]:
    """Return the labels that occur: in numeric order if all are numbers, else in alphabetical order.

    Raises:
        UsageError: there are fewer than two, or they look like scores: too many, or fractions.
    """
    names = {str(value) for value in values if value is not None}
    numbers = {name: as_number(name) for name in names}
    are_numbers = all(number is not None for number in numbers.values())
    ordered = sorted(names, key=lambda name: (numbers[name] if are_numbers else 0, name))
    if len(names) > MOST_LABELS or (are_numbers and any(number != round(number or 0) for number in numbers.values())):
        raise UsageError(
            f"{path}: the label column holds {len(names)} different values such as {ordered[-1]!r}; "
            "if they are scores, write data.regression=true; if they are classes, list them in data.labels"
        )
    if len(names) < 2:
        raise UsageError(f"{path}: all labels are {ordered[:1]}; a classification needs two or more")
    return tuple(ordered)


def read_label(value: Any, *, labels: Sequence[str] | None) -> int | float:
    """Return the index of a label, or, without `labels`, the score itself.

    Raises:
        UsageError: the value is none of the labels, or no finite number.
    """
    if value is None:
        raise UsageError("the label is null; fill it in, or drop the row")
    if labels is None:
        number = as_number(str(value))
        if number is None:
            raise UsageError(f"the score {value!r} is no finite number")
        return number
    if str(value) not in labels:
        raise UsageError(f"the label {value!r} is none of {', '.join(labels)}; name all of them in labels=[...]")
    return labels.index(str(value))


def as_number(text: str) -> float | None:
    """Return the finite number in `text`, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
