"""Entry-wise selection: optimizer, contract of a mask, compact state, top-k over gradients."""

from .global_top_k import GlobalTopK
from .left_out import say_left_out
from .mask import (
    SELECTABLE,
    AbstractCompactMask,
    AbstractDenseMask,
    AbstractMask,
    Choice,
    FromWeights,
    Indices,
    MaskTensor,
    TopOfGradient,
    check_size,
    check_trains,
    generator_of,
    matching_tensors,
    resolve_budget,
    share_out,
)
from .optimizer import SparseOptimizer
from .shards import Shards
from .store import RUN
from .top_k import StreamingTopK, chunk_length

__all__ = [
    "RUN",
    "SELECTABLE",
    "AbstractCompactMask",
    "AbstractDenseMask",
    "AbstractMask",
    "Choice",
    "FromWeights",
    "GlobalTopK",
    "Indices",
    "MaskTensor",
    "Shards",
    "SparseOptimizer",
    "StreamingTopK",
    "TopOfGradient",
    "check_size",
    "check_trains",
    "chunk_length",
    "generator_of",
    "matching_tensors",
    "resolve_budget",
    "say_left_out",
    "share_out",
]
