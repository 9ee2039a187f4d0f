"""Surroundings of a run: folder, processes, signals, messages, memory of the machine."""

from .allocator import keep_freed_memory
from .bfloat16 import fast_bfloat16
from .hub import HubId, check_hub, check_ids, hub_fault
from .machine import Memory, device_memory, host_bytes, machine_bytes, peak_process_bytes
from .messages import collected_messages, describe_messages
from .processes import (
    barrier,
    broadcast_from_rank_0,
    check_one_process,
    disconnect,
    end_process,
    is_rank_0,
    max_over_ranks,
    num_processes,
    own_process_group,
    take_device,
)
from .run_folder import RunFolder, claimed
from .signals import Preempted, SignalWatch, handled_signals, watched_signals

__all__ = [
    "HubId",
    "Memory",
    "Preempted",
    "RunFolder",
    "SignalWatch",
    "barrier",
    "broadcast_from_rank_0",
    "check_hub",
    "check_ids",
    "check_one_process",
    "claimed",
    "collected_messages",
    "describe_messages",
    "device_memory",
    "disconnect",
    "end_process",
    "fast_bfloat16",
    "handled_signals",
    "host_bytes",
    "hub_fault",
    "is_rank_0",
    "keep_freed_memory",
    "machine_bytes",
    "max_over_ranks",
    "num_processes",
    "own_process_group",
    "peak_process_bytes",
    "take_device",
    "watched_signals",
]
