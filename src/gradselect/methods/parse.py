"""Plain data as methods."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from gradselect.usage import UsageError

from .base import AbstractMethod
from .explanations import brief, explain
from .selection import AbstractSelectionMethod
from .settings import Settings
from .union import Method


class _Section(Settings):
    method: Method


def parse_method(values: Mapping[str, Any] | str | AbstractMethod, *, key: str = "method") -> AbstractMethod:
    """Return the method that plain values describe: the section `method` of a recipe, or its name alone.

    Args:
        values: `{"name": "adagradselect", "fraction": 0.3}`, or "adagradselect"; a method is returned as it is.
        key: name of the section in errors.

    Raises:
        UsageError: one line for each wrong key or value.

    Example:
        >>> parse_method({"name": "uniform", "count": 2}).residency
        'offload'
    """
    if isinstance(values, AbstractMethod):
        return values
    named = {"name": values} if isinstance(values, str) else values
    if not isinstance(named, Mapping):
        raise UsageError(
            f'{key}={brief(values)} is no method; write e.g. {key}={{"name": "adagradselect", "fraction": 0.2}}'
        )
    try:
        return _Section.model_validate({"method": dict(named)}).method
    except ValidationError as error:
        lines = [re.sub(r"\bmethod(?=[.: ])", key, line) for line in explain(error, root=_Section)]
        raise UsageError(lines[0] if len(lines) == 1 else "\n  ".join([f"{key} is not valid:", *lines])) from None


def parse_selection(
    values: Mapping[str, Any] | str | AbstractMethod, *, key: str = "method"
) -> AbstractSelectionMethod:
    """Return the method that plain values describe, if it builds an optimizer from a model alone.

    Args:
        values: as for `parse_method`.
        key: name of the section in errors.

    Raises:
        UsageError: a wrong key or value, or a method that needs `gradselect train`.

    Example:
        >>> parse_selection({"name": "gmt", "fraction": 0.2}).fraction
        0.2
    """
    method = parse_method(values, key=key)
    if not isinstance(method, AbstractSelectionMethod):
        raise UsageError(
            f"{key}.name={method.name!r} does not select blocks or entries, and cannot train in somebody else's "
            f"trainer; write {key}.name='adagradselect', or train with `gradselect train`"
        )
    method.check_needs_no_application()
    return method
