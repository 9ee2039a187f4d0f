"""Recipes: the schema, the methods that they can name, reading and writing."""

from .adapter_methods import AbstractAdapterMethod, AdaLoraMethod
from .block_methods import AbstractBlockMethod, AllMethod, FullMethod, Method
from .evaluation_settings import DEFAULT_PROMPT, HUB_DATA, EvaluationSettings
from .load import dump_recipe, explain, load_recipe, merge, parse_override, parse_recipe, read_values
from .mask_methods import AbstractFreeMaskMethod, AbstractMaskMethod, RunFacts, SparseGradMethod
from .peer_methods import AbstractPeerMethod, PeerFactory, peer_bytes
from .schema import (
    ChatData,
    ClassificationData,
    Data,
    FileData,
    ModelSettings,
    Place,
    PromptCompletionData,
    RandomData,
    Recipe,
    TextData,
    TokenData,
    is_packed,
)
from .settings import Settings

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
    "dump_recipe",
    "explain",
    "is_packed",
    "load_recipe",
    "merge",
    "parse_override",
    "parse_recipe",
    "peer_bytes",
    "read_values",
]
