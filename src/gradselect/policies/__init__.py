"""Policies: rules that select blocks. One final class per file."""

from .adagradselect import AdaGradSelect
from .all import All
from .cost_aware import CostAware
from .cyclic import Cyclic
from .fixed import Fixed
from .grad_norm import GradNormTopK
from .losia import LoSiA
from .misa import MISA
from .spectrum import Spectrum
from .stratified import Stratified
from .uniform import Uniform

__all__ = [
    "MISA",
    "AdaGradSelect",
    "All",
    "CostAware",
    "Cyclic",
    "Fixed",
    "GradNormTopK",
    "LoSiA",
    "Spectrum",
    "Stratified",
    "Uniform",
]
