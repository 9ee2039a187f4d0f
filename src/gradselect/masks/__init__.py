"""WHICH weights: the masks, one final class per file, and the saliences of `StaticMask`."""

from . import salience as salience
from .bitfit import BitFit as BitFit
from .gmt import GMT as GMT
from .id3 import ID3 as ID3
from .lift import LIFT as LIFT
from .static import StaticMask as StaticMask
from .top_gradient import TopGradient as TopGradient
