"""The optimizer inside what Accelerate hands to a callback."""

from __future__ import annotations

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer


def without_wrapper(optimizer: Any) -> Any:
    """Return the optimizer that Accelerate has wrapped; any other as it is."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
