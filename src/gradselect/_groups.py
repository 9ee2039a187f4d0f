"""The two parameter groups, decay and no decay, and the check of the hyper-parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch.nn import Parameter

from ._blocks import Block
from ._errors import UsageError


def check_hyper_parameters(
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, accumulation: int
) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0 or math.isinf(value):
            raise UsageError(f"{name}={value} must be a finite number >= 0; the default of {name} is a good start")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UsageError(f"betas={betas} must be two numbers in [0, 1); write betas=(0.9, 0.999)")
    if accumulation < 1:
        raise UsageError(f"accumulation_steps={accumulation} must be 1 or more: backward passes per step")


def decay_groups(
    blocks: Sequence[Block], *, no_decay: Sequence[str] | None, weight_decay: float
) -> list[dict[str, Any]]:
    """Named parameters in a decayed and an undecayed group, in model order; an empty group is left out."""
    named = [pair for block in blocks for pair in zip(block.parameter_names, block.parameters, strict=True)]
    for pattern in no_decay or ():
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise UsageError(f"no_decay pattern {pattern!r} matches no parameter; a parameter is named {named[0][0]!r}")

    def is_decayed(name: str, parameter: Parameter) -> bool:
        if no_decay is None:
            return parameter.ndim >= 2
        return not any(fnmatchcase(name, pattern) for pattern in no_decay)

    decayed = [(name, parameter) for name, parameter in named if is_decayed(name, parameter)]
    others = [(name, parameter) for name, parameter in named if not is_decayed(name, parameter)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
