"""Adapters that PEFT does not have, as methods of PEFT. Importing this package registers them; it needs peft."""

from .config import AdapterConfig
from .ether import EtherConfig
from .etherplus import EtherPlusConfig
from .hiwi import HiwiConfig
from .layer import AdapterLinear
from .lorta import LortaConfig
from .propulsion import PropulsionConfig
from .registration import register
from .tuner import AdapterTuner

__all__ = [
    "AdapterConfig",
    "AdapterLinear",
    "AdapterTuner",
    "EtherConfig",
    "EtherPlusConfig",
    "HiwiConfig",
    "LortaConfig",
    "PropulsionConfig",
    "register",
]
