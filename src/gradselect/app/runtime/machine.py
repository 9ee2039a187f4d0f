"""Memory of this machine and of this process."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import psutil
import torch


def host_bytes() -> int:
    """Return the bytes of this machine's main memory."""
    return psutil.virtual_memory().total


def machine_bytes() -> int:
    """Return the bytes of memory of this machine and of its GPUs."""
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return host_bytes() + sum(torch.cuda.get_device_properties(device).total_memory for device in devices)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The memory that a run would train in.

    Args:
        name: "this machine's memory", the name of a GPU, or "--fit".
        num_bytes: how much there is.
        is_host: True for that of a CPU: state that a plan counts "on host" lies in it too.
    """

    name: str
    num_bytes: int
    is_host: bool = False


def device_memory(device: str, *, fit: int | None = None) -> Memory:
    """Return the memory that a run on "auto" or "cpu" would use.

    Args:
        device: "auto" or "cpu".
        fit: bytes of `--fit`: of a card, which need not be in this machine, unless `device` is "cpu". None: without it.
    """
    if fit is not None:
        return Memory(name="--fit", num_bytes=fit, is_host=device == "cpu")
    if device != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Memory(name=properties.name, num_bytes=properties.total_memory)
    return Memory(name="this machine's memory", num_bytes=host_bytes(), is_host=True)


def peak_process_bytes() -> int:
    """Return the peak of main memory that this process has held."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    # psutil knows no peak elsewhere. Windows has no module `resource`.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
