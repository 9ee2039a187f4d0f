"""Selective fine-tuning: train, at every step, only the part of the model that matters now."""

from ._blocks import Block as Block
from ._blocks import partition as partition
from ._errors import UsageError as UsageError
from ._optimizer import BlockOptimizer as BlockOptimizer
from ._policy import AbstractPolicy as AbstractPolicy
from ._records import JsonlWriter as JsonlWriter
from ._records import StepRecord as StepRecord
from ._residency import AbstractResidency as AbstractResidency
from ._residency import Drop as Drop
from ._residency import Keep as Keep
from ._residency import Offload as Offload
from ._rules import AbstractRule as AbstractRule
from ._rules import AdamWRule as AdamWRule
from .policies import AdaGradSelect as AdaGradSelect
from .policies import All as All
from .policies import Cyclic as Cyclic
from .policies import Fixed as Fixed
from .policies import GradNormTopK as GradNormTopK
from .policies import Uniform as Uniform

__version__ = "0.1.0.dev0"

__all__ = [
    "AbstractPolicy",
    "AbstractResidency",
    "AbstractRule",
    "AdaGradSelect",
    "AdamWRule",
    "All",
    "Block",
    "BlockOptimizer",
    "Cyclic",
    "Drop",
    "Fixed",
    "GradNormTopK",
    "JsonlWriter",
    "Keep",
    "Offload",
    "StepRecord",
    "Uniform",
    "UsageError",
    "partition",
]
