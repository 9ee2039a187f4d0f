"""Adapters that PEFT does not have, as methods of PEFT. Importing this package registers them; it needs peft."""

from .ether import EtherConfig
from .etherplus import EtherPlusConfig
from .hiwi import HiwiConfig
from .lorta import LortaConfig
from .propulsion import PropulsionConfig

__all__ = [
    "EtherConfig",
    "EtherPlusConfig",
    "HiwiConfig",
    "LortaConfig",
    "PropulsionConfig",
]
