"""One AdamW step under a dense mask."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from gradselect.core import MASTER, BlockStates, Group
from gradselect.parallel import local_part


def masked_update(
    states: BlockStates, parameter: Parameter, group: Group, mask: Tensor, *, on: Literal["gradient", "update"]
) -> None:
    """Update a tensor whose gradient is there; weight decay touches entries of the mask only.

    Args:
        mask: bool, of the shape of what this process holds of the tensor.
        on: "gradient": the gradient is zero outside the mask already; moments and the weights they move go on
            everywhere. "update": moments see the whole gradient, weights outside the mask stay.
    """
    mine = local_part(parameter)
    weight = states.of(parameter).get(MASTER, mine)
    if on == "update":
        before = weight.clone()
        states.update([parameter], group)
        weight.copy_(torch.where(mask, weight, before))
        mine.copy_(weight)
        return
    decayed: dict[str, Any] = {**group, "weight_decay": 0.0}
    weight.copy_(torch.where(mask, weight * (1 - group["lr"] * group["weight_decay"]), weight))
    states.update([parameter], decayed)
