"""Masks: rules that select entries, one final class per file, and the saliences of `StaticMask`."""

from . import salience
from .bitfit import BitFit
from .gmt import GMT
from .id3 import ID3
from .lift import LIFT
from .static import StaticMask
from .top_gradient import TopGradient

__all__ = ["GMT", "ID3", "LIFT", "BitFit", "StaticMask", "TopGradient", "salience"]
