"""Methods from plain data, without loading pydantic when the library is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradselect.methods import AbstractMethod, AbstractSelectionMethod


def method(values: Mapping[str, Any] | str | AbstractMethod) -> AbstractSelectionMethod:
    """Return the selective method that plain data describes: the section `method` of a recipe.

    It goes wherever a method is taken: `SelectiveTraining(method=...)`, plug-ins, `.make_optimizer(model, lr=...)`.

    Args:
        values: e.g. `{"name": "adagradselect", "fraction": 0.3, "always": ["embedding"]}`, or a name alone. Keys not
            given have the recipe's defaults. A method is returned as it is.

    Raises:
        UsageError: one line for each wrong key or value, with what to type; or the method trains an adapter or runs
            through another package, which only `gradselect train` can do.

    Example:
        >>> method({"name": "adagradselect", "fraction": 0.3, "residency": "keep"}).fraction
        0.3
    """
    from gradselect.methods import parse_selection

    return parse_selection(values)
