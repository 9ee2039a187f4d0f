"""WHICH: the policies, one final class per file."""

from .adagradselect import AdaGradSelect as AdaGradSelect
from .all import All as All
from .cyclic import Cyclic as Cyclic
from .fixed import Fixed as Fixed
from .grad_norm import GradNormTopK as GradNormTopK
from .misa import MISA as MISA
from .uniform import Uniform as Uniform
