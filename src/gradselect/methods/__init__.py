"""Methods: plain data that says what to train, and what each builds. They need pydantic, and know no recipe."""

from .adapters import AbstractAdapterMethod, AdaLoraMethod, LoraMethod
from .base import AbstractMethod, RunFacts
from .blocks import AbstractBlockMethod, AllMethod, FullMethod
from .explanations import MAX_LINE, brief, cut, explain
from .generated_keys import dataclass_keys
from .masks import AbstractFreeMaskMethod, AbstractMaskMethod
from .mlp_masks import SparseGradMethod
from .old_keys import todays_method
from .parse import parse_method, parse_selection
from .peers import AbstractPeerMethod, PeerFactory, peer_bytes
from .selection import AbstractSelectionMethod
from .settings import Settings
from .spt import SPTMethod
from .union import Method

__all__ = [
    "MAX_LINE",
    "AbstractAdapterMethod",
    "AbstractBlockMethod",
    "AbstractFreeMaskMethod",
    "AbstractMaskMethod",
    "AbstractMethod",
    "AbstractPeerMethod",
    "AbstractSelectionMethod",
    "AdaLoraMethod",
    "AllMethod",
    "FullMethod",
    "LoraMethod",
    "Method",
    "PeerFactory",
    "RunFacts",
    "SPTMethod",
    "Settings",
    "SparseGradMethod",
    "brief",
    "cut",
    "dataclass_keys",
    "explain",
    "parse_method",
    "parse_selection",
    "peer_bytes",
    "todays_method",
]
