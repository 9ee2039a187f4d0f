"""SparseGrad: linears in a basis in which about one gradient entry in a hundred matters."""

from ._convert import convert as convert
from ._convert import fold as fold
from ._energy import EnergyShare as EnergyShare
from ._energy import energy as energy
from ._rotated import RotatedLinear as RotatedLinear
