"""Labels and scores: from the values in a file to the targets of a head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from gradselect.usage import UsageError

from .cells import label_text
from .row import Row, place_of

MOST_LABELS = 1000
"""More values than this are no classes; the largest common sets have a few hundred."""


def label_names(values: Iterable[Any], *, path: str, rows: Sequence[Row] = ()) -> tuple[str, ...]:
    """Return the labels that occur: in numeric order if all are numbers, else in alphabetical order.

    Args:
        values: the label of each row.
        path: name of the file.
        rows: the rows, for their places in messages.

    Raises:
        UsageError: a row has none, there are fewer than two, or they look like scores: too many, or fractions.
    """
    names = _names(values, rows, path=path)
    numbers = {name: as_number(name) for name in names}
    missing = [name for name in names if name.lower() == "nan"]
    if missing and len(names) > 2 and all(numbers[name] is not None for name in names if name not in missing):
        raise UsageError(
            f"{names[missing[0]]}: the label is {missing[0]!r}, and the others are numbers; fill it in, or drop the row"
        )
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


def _names(values: Iterable[Any], rows: Sequence[Row], *, path: str) -> dict[str, str]:
    """Return each label with the place of the first row that has it."""
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        try:
            first.setdefault(label_text(value), index)
        except UsageError as error:
            raise UsageError(f"{place_of(rows, index, path=path)}: the label {error}") from None
    return {name: place_of(rows, index, path=path) for name, index in first.items()}


def read_label(value: Any, *, labels: Sequence[str] | None) -> int | float:
    """Return the index of a label, or, without `labels`, the score itself.

    Raises:
        UsageError: the value is none of the labels, or no finite number.
    """
    try:
        text = label_text(value)
    except UsageError as error:
        raise UsageError(f"the {'label' if labels is not None else 'score'} {error}") from None
    if labels is None:
        number = as_number(text)
        if number is None:
            raise UsageError(f"the score {value!r} is no finite number")
        return number
    if text not in labels and isinstance(value, bool):
        text = str(value)  # the labels of a model that was trained before booleans were written as in JSON
    if text not in labels:
        raise UsageError(
            f"the label {text!r} is none of {', '.join(labels)}; name all of them, in data.labels=[...] or, "
            "in gradselect evaluate, --labels A,B"
        )
    return labels.index(text)


def as_number(text: str) -> float | None:
    """Return the finite number in `text`, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
