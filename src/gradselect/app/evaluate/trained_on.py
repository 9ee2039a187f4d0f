"""The recipe that a model was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradselect.files import read_sealed


def data_of_recipe(model: str | Path, *, format: str) -> dict[str, Any]:
    """Return section `data` of the recipe if `gradselect train` trained this model on this format; else {}."""
    file = Path(model) / "run.json"
    data = read_sealed(file, needed=["recipe"])["recipe"]["data"] if file.is_file() else {}
    return data if data.get("format") == format else {}
