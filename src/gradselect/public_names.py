"""Public names of the library, which `import gradselect` gives. Needs torch, which takes seconds to load."""

import gradselect.delta
import gradselect.sparsegrad
import gradselect.spt  # noqa: F401  # so that gs.delta, gs.sparsegrad and gs.spt are there
from gradselect.blocks import AbstractPolicy, BlockOptimizer, Borders, partition
from gradselect.core import (
    AbstractResidency,
    AbstractRule,
    AdamW8bitRule,
    AdamWRule,
    Block,
    Drop,
    JsonlWriter,
    Keep,
    MaskRecord,
    Offload,
    Patch,
    SGDRule,
    StepRecord,
    TorchRule,
)
from gradselect.entries import AbstractCompactMask, AbstractDenseMask, AbstractMask, SparseOptimizer
from gradselect.masks import (
    GMT,
    ID3,
    LIFT,
    BitFit,
    FixedEntries,
    MoFO,
    SpaRTA,
    StaticMask,
    TopGradient,
    salience,
)
from gradselect.plain_data import method
from gradselect.planning import plan
from gradselect.policies import (
    MISA,
    AdaGradSelect,
    All,
    CostAware,
    Cyclic,
    Fixed,
    GradNormTopK,
    LoSiA,
    Spectrum,
    Stratified,
    Uniform,
)
from gradselect.slices import join_slices
from gradselect.usage import UsageError

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
    "Borders",
    "CostAware",
    "Cyclic",
    "Drop",
    "Fixed",
    "FixedEntries",
    "GradNormTopK",
    "JsonlWriter",
    "Keep",
    "LoSiA",
    "MaskRecord",
    "MoFO",
    "Offload",
    "Patch",
    "SGDRule",
    "SpaRTA",
    "SparseOptimizer",
    "Spectrum",
    "StaticMask",
    "StepRecord",
    "Stratified",
    "TopGradient",
    "TorchRule",
    "Uniform",
    "UsageError",
    "join_slices",
    "method",
    "partition",
    "plan",
    "salience",
]
