"""Recipes: the schema, the methods, reading and writing."""

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
from .explanations import explain
from .load import dump_recipe, load_recipe, parse_recipe, read_values, todays_recipe
from .methods import (
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
    SparseGradMethod,
    dataclass_keys,
    peer_bytes,
    todays_method,
)
from .overrides import merge, parse_override, with_overrides
from .schema import ModelSettings, Recipe
from .settings import Settings
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
