"""Masks: rules that select entries, one final class per file, and the saliences of `StaticMask`."""

from . import salience
from .bitfit import BitFit
from .fixed_entries import FixedEntries
from .gmt import GMT
from .id3 import ID3
from .lift import LIFT
from .mofo import MoFO
from .sparta import SpaRTA
from .static import StaticMask, estimate_scores
from .top_gradient import TopGradient

__all__ = [
    "GMT",
    "ID3",
    "LIFT",
    "BitFit",
    "FixedEntries",
    "MoFO",
    "SpaRTA",
    "StaticMask",
    "TopGradient",
    "estimate_scores",
    "salience",
]
