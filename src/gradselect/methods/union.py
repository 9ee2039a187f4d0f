"""The list of all methods."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from .adapters import AbstractAdapterMethod, AdaLoraMethod, LoraMethod, OtherAdapterMethod
from .blocks import AbstractBlockMethod, FixedMethod, FullMethod, LastMethod
from .masks import AbstractMaskMethod, LoraSPMethod, StaticMethod, mask_methods
from .mlp_masks import MePropMethod, SparseGradMethod
from .own_adapters import EtherMethod, HiwiMethod, LortaMethod, PropulsionMethod
from .peers import AbstractPeerMethod, BAdamPackageMethod, GaLoreMethod
from .policies import PRESETS, policy_methods
from .spt import SPTMethod

if TYPE_CHECKING:
    Method = AbstractBlockMethod | FullMethod | AbstractAdapterMethod | AbstractPeerMethod | AbstractMaskMethod
else:
    METHODS = (
        *policy_methods(),
        *(preset.method() for preset in PRESETS),
        LastMethod,
        FixedMethod,
        FullMethod,
        LoraMethod,
        AdaLoraMethod,
        OtherAdapterMethod,
        EtherMethod,
        PropulsionMethod,
        LortaMethod,
        HiwiMethod,
        BAdamPackageMethod,
        GaLoreMethod,
        *mask_methods(),
        StaticMethod,
        LoraSPMethod,
        SPTMethod,
        SparseGradMethod,
        MePropMethod,
    )
    Method = Annotated[reduce(or_, METHODS), Field(discriminator="name")]
