"""Types of values that several sections have."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, Field


def check_place(path: str) -> str:
    """Return the path with ~ replaced by the home folder.

    Raises:
        ValueError: no file can have this name.
    """
    path = os.path.expanduser(path)
    if not path.strip() or len(path) > 4000 or any(len(os.fsencode(part)) > 255 for part in path.split("/")):
        raise ValueError(f"{path[:40]!r} is no path: it is empty, or longer than a file's name can be")
    return path


Place = Annotated[str, AfterValidator(check_place)]
"""A path, or an id on the hub. ~ is the home folder: in key=~/value a shell leaves the ~ as it is."""

Count = Annotated[int, Field(ge=1, le=10**9)]
"""A number of things. A larger one is a typing error."""

Tokens = Annotated[int, Field(ge=1, le=2**24)]
"""Tokens of an example."""
