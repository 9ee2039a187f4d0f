"""Methods: the section `method` of a recipe, and what each builds. No file here knows the rest of a recipe."""

from .adapters import AbstractAdapterMethod, AdaLoraMethod
from .blocks import AbstractBlockMethod, AllMethod, FullMethod
from .dataclass_keys import dataclass_keys
from .masks import AbstractFreeMaskMethod, AbstractMaskMethod, RunFacts
from .mlp_masks import SparseGradMethod
from .old_keys import todays_method
from .peers import AbstractPeerMethod, PeerFactory, peer_bytes
from .union import Method

__all__ = [
    "AbstractAdapterMethod",
    "AbstractBlockMethod",
    "AbstractFreeMaskMethod",
    "AbstractMaskMethod",
    "AbstractPeerMethod",
    "AdaLoraMethod",
    "AllMethod",
    "FullMethod",
    "Method",
    "PeerFactory",
    "RunFacts",
    "SparseGradMethod",
    "dataclass_keys",
    "peer_bytes",
    "todays_method",
]
