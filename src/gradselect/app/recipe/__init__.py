"""Recipes: the schema, the methods, reading and writing."""

from gradselect.methods import (
    AbstractAdapterMethod,
    AbstractBlockMethod,
    AbstractFreeMaskMethod,
    AbstractMaskMethod,
    AbstractPeerMethod,
    AdaLoraMethod,
    AllMethod,
    FullMethod,
    Method,
    PeerFactory,
    RunFacts,
    Settings,
    SparseGradMethod,
    dataclass_keys,
    explain,
    peer_bytes,
    todays_method,
)

from .data_settings import (
    ChatData,
    ClassificationData,
    Data,
    FileData,
    PromptCompletionData,
    RandomData,
    TextData,
    TokenData,
    is_packed,
)
from .evaluation_settings import DEFAULT_PROMPT, HUB_DATA, EvaluationSettings
from .hub_ids import ids_of_evaluation, ids_of_recipe
from .load import dump_recipe, load_recipe, parse_recipe, read_values, todays_recipe
from .overrides import merge, parse_override, with_overrides
from .schema import ModelSettings, Recipe
from .values import Place

__all__ = [
    "DEFAULT_PROMPT",
    "HUB_DATA",
    "AbstractAdapterMethod",
    "AbstractBlockMethod",
    "AbstractFreeMaskMethod",
    "AbstractMaskMethod",
    "AbstractPeerMethod",
    "AdaLoraMethod",
    "AllMethod",
    "ChatData",
    "ClassificationData",
    "Data",
    "EvaluationSettings",
    "FileData",
    "FullMethod",
    "Method",
    "ModelSettings",
    "PeerFactory",
    "Place",
    "PromptCompletionData",
    "RandomData",
    "Recipe",
    "RunFacts",
    "Settings",
    "SparseGradMethod",
    "TextData",
    "TokenData",
    "dataclass_keys",
    "dump_recipe",
    "explain",
    "ids_of_evaluation",
    "ids_of_recipe",
    "is_packed",
    "load_recipe",
    "merge",
    "parse_override",
    "parse_recipe",
    "peer_bytes",
    "read_values",
    "todays_method",
    "todays_recipe",
    "with_overrides",
]
