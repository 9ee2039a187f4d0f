"""Kinds of devices that decide defaults: fused kernels, and the place of state that is not in use."""

from __future__ import annotations

import torch

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
