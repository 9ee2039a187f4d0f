"""SparseGrad: linear layers in a basis that concentrates the gradient in about 1 % of its entries."""

from .conversion import convert, fold
from .gradient_energy import EnergyShare, energy
from .layers import choose_layers
from .rotated import RotatedLinear

__all__ = ["EnergyShare", "RotatedLinear", "choose_layers", "convert", "energy", "fold"]
