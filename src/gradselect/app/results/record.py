"""Base class of everything that the application keeps as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from gradselect.files import read_sealed
from gradselect.usage import UsageError

# JSON has both; a count that became 3.0 would no longer match the digest in its file.
Number = int | float


class Record(BaseModel):
    """Part of a JSON file.

    Keys that this version does not know, e.g. those of a newer one, are kept. Keys that an older version did not write
    have defaults.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    def values(self) -> dict[str, Any]:
        """Return plain values for JSON: the keys that were given, without defaults."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    @classmethod
    def read(cls, path: Path, *, name: str) -> Self:
        """Read a sealed file; errors call it `name`.

        Raises:
            UsageError: the file is damaged or half-written, or a key is missing or has a wrong value; names the key.
        """
        return cls.check(read_sealed(path, name=name), name=name)

    @classmethod
    def check(cls, values: Mapping[str, Any], *, name: str) -> Self:
        """Check the values of a file; errors call it `name`.

        Raises:
            UsageError: a key is missing or has a wrong value; names the first.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key, fault = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
            raise UsageError(f"{name}: damaged: {key}: {fault}; put a copy back, or make it again") from None
