"""Slices: ranges of rows or columns of linear layers that train on their own and cost only their share."""

from .conversion import (
    check_free,
    check_whole_layers,
    inputs_shared_by,
    join_slices,
    size_of,
    slice_linear,
    sliced_linears,
)
from .sliced_linear import NO_SHARDS, SlicedLinear

__all__ = [
    "NO_SHARDS",
    "SlicedLinear",
    "check_free",
    "check_whole_layers",
    "inputs_shared_by",
    "join_slices",
    "size_of",
    "slice_linear",
    "sliced_linears",
]
