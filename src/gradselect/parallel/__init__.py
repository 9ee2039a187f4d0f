"""Several processes: local parts of tensors, exact sums, agreement of ranks, data-parallel wrappers."""

from .agreement import RankAgreement, check_alike
from .sums import SquareSums, add_up, total
from .tensors import (
    Groups,
    as_dtensor,
    collective_device,
    first_index,
    is_averaged_in_hooks,
    is_dtensor,
    is_one_of_many,
    is_running,
    local_part,
    local_part_of,
    naming_the_collective,
    shard_groups,
    whole,
)
from .wrappers import check_placement, unwrapped, unwrapping

__all__ = [
    "Groups",
    "RankAgreement",
    "SquareSums",
    "add_up",
    "as_dtensor",
    "check_alike",
    "check_placement",
    "collective_device",
    "first_index",
    "is_averaged_in_hooks",
    "is_dtensor",
    "is_one_of_many",
    "is_running",
    "local_part",
    "local_part_of",
    "naming_the_collective",
    "shard_groups",
    "total",
    "unwrapped",
    "unwrapping",
    "whole",
]
