"""Devices: which kinds decide defaults, and copies of many tensors in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WITH_FUSED_KERNELS = ("cuda", "hpu", "mps", "mtia", "xpu")
"""Accelerators whose fused AdamW torch supports by name."""


def is_accelerator(device: torch.device) -> bool:
    """True if the device has memory and kernels of its own. Weights on `meta` are nowhere yet."""
    return device.type not in ("cpu", "meta")


def has_fused_kernels(device: torch.device) -> bool:
    """True if AdamW takes its fused kernel by default."""
    return is_accelerator(device) and device.type in WITH_FUSED_KERNELS


def device_of_run(device: torch.device) -> torch.device:
    """Return the device that a run will use: this one, or for `meta` the machine's accelerator, else its CPU."""
    if device.type != "meta":
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor], *, non_blocking: bool = False) -> None:
    """Copy each source into its target, all in one call of torch."""
    _foreach_copy(list(targets), list(sources), non_blocking=non_blocking)


_foreach_copy: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
