"""What both optimizers share: the base class, parameter groups, rules, state, residency, records, gradients."""

from .adamw_8bit import AdamW8bitRule
from .block import Block
from .checkpoint_identity import as_text, check_same, selection_of, states_by_name
from .freezing import freeze, give_back, is_frozen_for_now
from .gradients import _at_end_of_pass, _norm_of, dense, gradient_norm
from .optimizer import SelectiveOptimizer
from .parameter_groups import Group, ParameterTable, decay_groups
from .records import MEMORY_CATEGORIES, JsonlWriter, MaskRecord, MemoryBytes, StepRecord, selection_entropy
from .residency import AbstractResidency, Drop, Keep, Offload
from .rules import AbstractRule, AdamWRule
from .state import HALF, MASTER, BlockStates, StateStore, num_bytes

__all__ = [
    "HALF",
    "MASTER",
    "MEMORY_CATEGORIES",
    "AbstractResidency",
    "AbstractRule",
    "AdamW8bitRule",
    "AdamWRule",
    "Block",
    "BlockStates",
    "Drop",
    "Group",
    "JsonlWriter",
    "Keep",
    "MaskRecord",
    "MemoryBytes",
    "Offload",
    "ParameterTable",
    "SelectiveOptimizer",
    "StateStore",
    "StepRecord",
    "_at_end_of_pass",
    "_norm_of",
    "as_text",
    "check_same",
    "decay_groups",
    "dense",
    "freeze",
    "give_back",
    "gradient_norm",
    "is_frozen_for_now",
    "num_bytes",
    "selection_entropy",
    "selection_of",
    "states_by_name",
]
