"""Base class of all methods."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Any

from ..settings import Settings


class AbstractMethod(Settings, ABC):
    """The section `method` of a recipe.

    A method imports nothing of the other sections, so that others can use the methods without a recipe.

    Attributes:
        name: name of the method in recipes, suites and reports.
    """

    if TYPE_CHECKING:
        # Each method declares its own `Literal`, after the keys that it shares with others of its kind.
        name: Any
