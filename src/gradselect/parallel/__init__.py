"""Several processes: local parts of tensors, exact sums, agreement of ranks, data-parallel wrappers."""

from .agreement import Together, check_alike
from .sums import SquareSums, add_up, total
from .tensors import (
    Groups,
    collective_device,
    first_index,
    held,
    is_averaged_in_hooks,
    is_one_of_many,
    is_running,
    is_spread,
    shard_groups,
    share,
    speaking,
    spread,
    whole,
)
from .wrappers import check_placement, unwrapped, unwrapping

__all__ = [
    "Groups",
    "SquareSums",
    "Together",
    "add_up",
    "check_alike",
    "check_placement",
    "collective_device",
    "first_index",
    "held",
    "is_averaged_in_hooks",
    "is_one_of_many",
    "is_running",
    "is_spread",
    "shard_groups",
    "share",
    "speaking",
    "spread",
    "total",
    "unwrapped",
    "unwrapping",
    "whole",
]
