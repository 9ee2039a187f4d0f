"""Memory of this machine."""

from __future__ import annotations

import os

import torch


def machine_bytes() -> int:
    """Bytes of memory of this machine and of its GPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return memory + sum(torch.cuda.get_device_properties(device).total_memory for device in devices)
