"""Memory of this machine and of this process."""

from __future__ import annotations

import sys

import psutil
import torch


def host_bytes() -> int:
    """Return the bytes of this machine's main memory."""
    return psutil.virtual_memory().total


def machine_bytes() -> int:
    """Return the bytes of memory of this machine and of its GPUs."""
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return host_bytes() + sum(torch.cuda.get_device_properties(device).total_memory for device in devices)


def device_memory(device: str) -> tuple[str, int]:
    """Return the name and the bytes of the memory that a run on "auto" or "cpu" would use."""
    if device != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.name, properties.total_memory
    return "this machine's memory", host_bytes()


def peak_process_bytes() -> int:
    """Return the peak of main memory that this process has held."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    # psutil knows no peak elsewhere. Windows has no module `resource`.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
