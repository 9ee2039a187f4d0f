"""Base class of every section of a recipe or suite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Values written by a user: checked once, never changed. An unknown key is an error.

    Attributes:
        renamed: today's key for each old one, so that the error can name it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    renamed: ClassVar[Mapping[str, str]] = {}
