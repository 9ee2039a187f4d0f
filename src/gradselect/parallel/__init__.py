"""Several ranks: local parts of tensors, exact sums, agreement of ranks, data-parallel wrappers."""

from .agreement import RankAgreement, check_alike
from .sums import NormSums, sum_over_ranks, total
from .tensors import (
    Groups,
    as_dtensor,
    collective_device,
    full_tensor,
    has_other_ranks,
    is_averaged_in_hooks,
    is_dtensor,
    is_running,
    local_part,
    local_part_like,
    local_start,
    naming_the_collective,
    shard_groups,
)
from .wrappers import check_module, check_placement, unwrapped, unwrapping

__all__ = [
    "Groups",
    "NormSums",
    "RankAgreement",
    "as_dtensor",
    "check_alike",
    "check_module",
    "check_placement",
    "collective_device",
    "full_tensor",
    "has_other_ranks",
    "is_averaged_in_hooks",
    "is_dtensor",
    "is_running",
    "local_part",
    "local_part_like",
    "local_start",
    "naming_the_collective",
    "shard_groups",
    "sum_over_ranks",
    "total",
    "unwrapped",
    "unwrapping",
]
