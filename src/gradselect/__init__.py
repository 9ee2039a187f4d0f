"""Selective fine-tuning: train, at every step, only the part of the model that matters now."""

from typing import TYPE_CHECKING, Any

from . import delta as delta
from . import sparsegrad as sparsegrad
from ._blocks import Block as Block
from ._blocks import partition as partition
from ._errors import UsageError as UsageError
from ._low_bit import AdamW8bitRule as AdamW8bitRule
from ._mask import AbstractCompactMask as AbstractCompactMask
from ._mask import AbstractDenseMask as AbstractDenseMask
from ._mask import AbstractMask as AbstractMask
from ._optimizer import BlockOptimizer as BlockOptimizer
from ._policy import AbstractPolicy as AbstractPolicy
from ._records import JsonlWriter as JsonlWriter
from ._records import MaskRecord as MaskRecord
from ._records import StepRecord as StepRecord
from ._residency import AbstractResidency as AbstractResidency
from ._residency import Drop as Drop
from ._residency import Keep as Keep
from ._residency import Offload as Offload
from ._rules import AbstractRule as AbstractRule
from ._rules import AdamWRule as AdamWRule
from ._sparse import SparseOptimizer as SparseOptimizer
from .masks import GMT as GMT
from .masks import ID3 as ID3
from .masks import LIFT as LIFT
from .masks import BitFit as BitFit
from .masks import StaticMask as StaticMask
from .masks import TopGradient as TopGradient
from .masks import salience as salience
from .policies import MISA as MISA
from .policies import AdaGradSelect as AdaGradSelect
from .policies import All as All
from .policies import Cyclic as Cyclic
from .policies import Fixed as Fixed
from .policies import GradNormTopK as GradNormTopK
from .policies import Uniform as Uniform

if TYPE_CHECKING:
    from .planning import plan as plan

__version__ = "0.1.0.dev0"

__all__ = [
    "GMT",
    "ID3",
    "LIFT",
    "MISA",
    "AbstractCompactMask",
    "AbstractDenseMask",
    "AbstractMask",
    "AbstractPolicy",
    "AbstractResidency",
    "AbstractRule",
    "AdaGradSelect",
    "AdamW8bitRule",
    "AdamWRule",
    "All",
    "BitFit",
    "Block",
    "BlockOptimizer",
    "Cyclic",
    "Drop",
    "Fixed",
    "GradNormTopK",
    "JsonlWriter",
    "Keep",
    "MaskRecord",
    "Offload",
    "SparseOptimizer",
    "StaticMask",
    "StepRecord",
    "TopGradient",
    "Uniform",
    "UsageError",
    "partition",
    "plan",
    "salience",
]


def __getattr__(name: str) -> Any:
    """`plan` is loaded when it is asked for: it belongs to the application, and training does without."""
    if name == "plan":
        from .planning import plan

        return plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
