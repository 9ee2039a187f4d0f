"""Find the base model and the recipe of the quickstart: beside this file in a wheel, else in the repository."""

from __future__ import annotations

from pathlib import Path

from gradselect.usage import UsageError

HERE = Path(__file__).parent
REPOSITORY = Path(__file__).parents[4]


def base_folder() -> Path:
    """Return the folder of the base model.

    Raises:
        UsageError: this installation has none.
    """
    return _found("base", in_repository="quickstart/base", holds="config.json")


def recipe_file() -> Path:
    """Return the recipe.

    Raises:
        UsageError: this installation has none.
    """
    return _found("quickstart.yaml", in_repository="recipes/quickstart.yaml")


def _found(packed: str, *, in_repository: str, holds: str = "") -> Path:
    for path in (HERE / packed, REPOSITORY / in_repository):
        if (path / holds).exists():
            return path
    raise UsageError(
        f"this installation has no {packed} of the quickstart, neither in {HERE} nor as {REPOSITORY / in_repository}; "
        "install the wheel again, or the repository with: pip install -e ."
    )
