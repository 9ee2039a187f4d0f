"""Settings of a selective optimizer as plain values, for the configuration of a run in a tracker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from gradselect import BlockOptimizer, SparseOptimizer, __version__

LONGEST = 250
"""Letters of a value; longer lists are cut, with their length. Trackers refuse or hide longer ones."""


def method_settings(optimizer: BlockOptimizer | SparseOptimizer) -> dict[str, Any]:
    """Return everything that decides how `optimizer` selects and updates, by name, as plain values.

    Names: "selection/policy" and "selection/policy/fraction", or "selection/mask" and "selection/mask/budget";
    "selection/rule", "selection/residency", "selection/blocks", "selection/always", "selection/lr" and so on.

    Example:
        >>> import torch, gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> settings = method_settings(gs.BlockOptimizer(model, gs.Uniform(fraction=0.3)))
        >>> settings["selection/policy"], settings["selection/policy/fraction"], settings["selection/blocks"]
        ('Uniform', 0.3, 'layer.0, layer.1, layer.2')
    """
    values: dict[str, Any] = {"gradselect": __version__}
    if isinstance(optimizer, BlockOptimizer):
        values |= _named("policy", optimizer.policy, optimizer.policy.settings())
        values |= {"blocks": optimizer.blocks, "update_in_backward": optimizer.update_in_backward}
        values |= _named("residency", optimizer.residency)
        values |= {f"borders/{key}": value for key, value in optimizer.borders.items()}
    else:
        values |= _named("mask", optimizer.mask, optimizer.mask.settings())
        values |= {"max_grad_norm": optimizer.max_grad_norm}
    values |= _named("rule", optimizer.rule)
    values |= {"always": optimizer.always_trained, "master_dtype": optimizer.master_dtype}
    values |= {"skip_nonfinite": optimizer.skip_nonfinite}
    values |= {name: value for name, value in optimizer.defaults.items() if not name.startswith("initial_")}
    return {f"selection/{name}": _plain(value) for name, value in values.items()}


def _named(name: str, part: Any, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the class of a part of the method, and its settings."""
    if settings is None:
        settings = {each.name: getattr(part, each.name) for each in fields(part)} if is_dataclass(part) else {}
    return {name: type(part).__name__, **{f"{name}/{key}": value for key, value in settings.items()}}


def _plain(value: Any) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Sequence):
        text = ", ".join(map(str, value)) or "none"
        return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(value)})"
    return str(value)
