"""What every run has: its folder, its processes, its signals, its messages."""

from .machine import machine_bytes
from .messages import collected_messages
from .processes import (
    check_one_process,
    is_first,
    largest_of_all,
    num_processes,
    said_by_first,
    take_device,
    wait_for_all,
)
from .run_folder import RunFolder, claimed
from .signals import Preempted, SignalWatch, watched_signals

__all__ = [
    "Preempted",
    "RunFolder",
    "SignalWatch",
    "check_one_process",
    "claimed",
    "collected_messages",
    "is_first",
    "largest_of_all",
    "machine_bytes",
    "num_processes",
    "said_by_first",
    "take_device",
    "wait_for_all",
    "watched_signals",
]
