"""Main memory that a training on the CPU frees at each step and needs again at the next."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_MMAP_MAX = -4
_OF_THE_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
_LARGEST_BLOCK = 1 << 30
"""Blocks above this many bytes still go back at once: they are few, and their gaps would be hard to fill."""


def keep_freed_memory(device: str) -> bool:
    """Let the C library keep what a training on the CPU frees, instead of giving it back to the system.

    By default glibc gives blocks of more than 32 MB back when they are freed, and maps new ones at the next step, whose
    pages the system clears one by one. The logits and gradients of a language model are such blocks: on a model of 135
    million parameters two fifths of a step went there (LOG.md). Nothing is computed in another way. The memory of the
    process stays at its peak until it ends.

    A user who has set one of glibc's variables (`MALLOC_MMAP_THRESHOLD_`, `MALLOC_MMAP_MAX_`,
    `MALLOC_TRIM_THRESHOLD_`, `GLIBC_TUNABLES`) keeps these settings. On a GPU torch keeps memory itself.

    Args:
        device: "cpu", or "auto" for an accelerator if there is one.

    Returns:
        True if the C library was told so; False on an accelerator, without glibc, or with settings of the user's.
    """
    if device != "cpu" and torch.accelerator.is_available():
        return False
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _OF_THE_USER):
        return False
    libc = ctypes.CDLL(None)
    # Older versions of glibc refuse a threshold above 32 MB. There no block of any size goes back at once.
    keeps_blocks = libc.mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK) or libc.mallopt(_MMAP_MAX, 0)
    return bool(keeps_blocks) and bool(libc.mallopt(_TRIM_THRESHOLD, -1))
