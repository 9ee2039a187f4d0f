"""Block-wise selection: the optimizer, the partition of a model, the contract of a policy, gradient observation."""

from .draws import gumbel, log_gamma, stream
from .flops import FULL_STEP, speed_up_limit, step_time, visited_share
from .optimizer import BlockOptimizer
from .partitioning import partition, resolve_names
from .policy import AbstractPolicy, Norms, best, check_fraction_or_count, resolve_count, taking_part
from .structure import Layout, ask

__all__ = [
    "FULL_STEP",
    "AbstractPolicy",
    "BlockOptimizer",
    "Layout",
    "Norms",
    "ask",
    "best",
    "check_fraction_or_count",
    "gumbel",
    "log_gamma",
    "partition",
    "resolve_count",
    "resolve_names",
    "speed_up_limit",
    "step_time",
    "stream",
    "taking_part",
    "visited_share",
]
