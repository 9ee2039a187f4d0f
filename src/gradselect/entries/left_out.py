"""Tensors that a method of matrices leaves out."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import Tensor

from gradselect.usage import listed

logger = logging.getLogger(__name__)

MOST_NAMES = 3
"""Names that the warning lists."""


def say_left_out(named: Iterable[tuple[str, Tensor]], *, method: str) -> None:
    """Say how many weights inside the layers are in tensors of three dimensions or more, which a method leaves out.

    In a mixture of experts that is most of the model: the experts of a layer are one tensor.

    Args:
        named: parameters that can train, by name. Those with a number in the name are inside the layers.
        method: what leaves them out, in words.

    Example:
        >>> import torch
        >>> say_left_out([("layers.0.up.weight", torch.zeros(4, 4))], method="LIFT")
    """
    inside = {name: each for name, each in named if any(part.isdecimal() for part in name.split("."))}
    left = [name for name, each in inside.items() if each.ndim > 2]
    if not left:
        return
    logger.warning(
        "%s takes matrices only: %d tensors of three dimensions or more, such as experts, with %s of the %s weights "
        "inside the layers, stay as they are (%s); StaticMask and BlockOptimizer train them too",
        *(method, len(left), f"{sum(inside[name].numel() for name in left):,}"),
        f"{sum(each.numel() for each in inside.values()):,}",
        listed(left, most=MOST_NAMES),
    )
