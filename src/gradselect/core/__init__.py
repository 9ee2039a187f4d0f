"""Shared parts of both optimizers: base class, parameter groups, rules, state, residency, records, gradients."""

from .adamw import AdamWRule
from .adamw_8bit import AdamW8bitRule
from .adapters import weights_of_adapters
from .attention_names import ATTENTION_OUTPUTS, ATTENTION_VALUES, QUERIES_KEYS_VALUES
from .bfloat16 import SLOW_BFLOAT16, bfloat16_cost
from .block import Block, num_bytes
from .checkpoint_identity import (
    NOT_OF_A_GROUP,
    as_text,
    check_present,
    check_same,
    plain_numbers,
    selection_of,
    states_by_name,
)
from .devices import device_of_run, has_fused_kernels, is_accelerator
from .freezing import Ownership, freeze, is_frozen_for_now, is_kept_frozen, settle
from .gradients import AbstractGradientHooks, Measure, dense, gradient_norm, norm_of, squared_norm
from .history import BlockHistory, EntryHistory, merge_orders, read_history
from .masters import HALF, MASTER, agrees, is_strided, take_over, unrounded
from .optimizer import SelectiveOptimizer
from .output_probes import WHOLE, OutputProbes
from .parameter_groups import Group, ParameterTable
from .passes import BackwardPasses
from .patch import Entries, Patch, index_dtype, is_smaller_whole
from .phases import SELECTION, Phases, in_phase
from .quantised import ADVICE, below, can_train, is_chosen, is_quantised, nothing_trains, quantised_weights
from .records import MEMORY_CATEGORIES, JsonlWriter, MaskRecord, MemoryBytes, StepRecord, selection_entropy
from .residency import AbstractResidency, Drop, Keep, Offload, default_residency
from .rules import AbstractRule, Ages, State, check_shards
from .saved_names import Place, Region, places_of
from .settings import UpdateSettings
from .sgd import SGDRule
from .state import BlockStates
from .torch_rule import TorchRule
from .watch import is_list
from .weight_updates import WeightUpdates

__all__ = [
    "ADVICE",
    "ATTENTION_OUTPUTS",
    "ATTENTION_VALUES",
    "HALF",
    "MASTER",
    "MEMORY_CATEGORIES",
    "NOT_OF_A_GROUP",
    "QUERIES_KEYS_VALUES",
    "SELECTION",
    "SLOW_BFLOAT16",
    "WHOLE",
    "AbstractGradientHooks",
    "AbstractResidency",
    "AbstractRule",
    "AdamW8bitRule",
    "AdamWRule",
    "Ages",
    "BackwardPasses",
    "Block",
    "BlockHistory",
    "BlockStates",
    "Drop",
    "Entries",
    "EntryHistory",
    "Group",
    "JsonlWriter",
    "Keep",
    "MaskRecord",
    "Measure",
    "MemoryBytes",
    "Offload",
    "OutputProbes",
    "Ownership",
    "ParameterTable",
    "Patch",
    "Phases",
    "Place",
    "Region",
    "SGDRule",
    "SelectiveOptimizer",
    "State",
    "StepRecord",
    "TorchRule",
    "UpdateSettings",
    "WeightUpdates",
    "agrees",
    "as_text",
    "below",
    "bfloat16_cost",
    "can_train",
    "check_present",
    "check_same",
    "check_shards",
    "default_residency",
    "dense",
    "device_of_run",
    "freeze",
    "gradient_norm",
    "has_fused_kernels",
    "in_phase",
    "index_dtype",
    "is_accelerator",
    "is_chosen",
    "is_frozen_for_now",
    "is_kept_frozen",
    "is_list",
    "is_quantised",
    "is_smaller_whole",
    "is_strided",
    "merge_orders",
    "norm_of",
    "nothing_trains",
    "num_bytes",
    "places_of",
    "plain_numbers",
    "quantised_weights",
    "read_history",
    "selection_entropy",
    "selection_of",
    "settle",
    "squared_norm",
    "states_by_name",
    "take_over",
    "unrounded",
    "weights_of_adapters",
]
