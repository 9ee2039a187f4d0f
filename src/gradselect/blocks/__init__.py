"""Block-wise selection: optimizer, partition of a model, contract of a policy, observation of gradients."""

from .borders import Borders
from .draws import gumbel, log_gamma, random_stream
from .flops import Depth, StepCost, layer_of, speed_up_limit
from .optimizer import BlockOptimizer
from .partitioning import partition, resolve_names
from .policy import (
    LAYERS,
    AbstractPolicy,
    Norms,
    check_fraction_or_count,
    largest,
    resolve_count,
    resolve_count_now,
    taking_part,
    tells,
)
from .structure import Layout, module_of_getter

__all__ = [
    "LAYERS",
    "AbstractPolicy",
    "BlockOptimizer",
    "Borders",
    "Depth",
    "Layout",
    "Norms",
    "StepCost",
    "check_fraction_or_count",
    "gumbel",
    "largest",
    "layer_of",
    "log_gamma",
    "module_of_getter",
    "partition",
    "random_stream",
    "resolve_count",
    "resolve_count_now",
    "resolve_names",
    "speed_up_limit",
    "taking_part",
    "tells",
]
