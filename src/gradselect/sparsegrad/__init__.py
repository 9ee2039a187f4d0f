"""SparseGrad: linears in a basis in which about one gradient entry in a hundred matters."""

from .conversion import convert, fold
from .gradient_energy import EnergyShare, energy
from .layers import choose_layers
from .rotated import RotatedLinear

__all__ = ["EnergyShare", "RotatedLinear", "choose_layers", "convert", "energy", "fold"]
