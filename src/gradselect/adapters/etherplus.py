"""ETHER+: inputs and outputs of a layer bent at pairs of learned hyperplanes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import Parameter

from gradselect.usage import check_whole

from .config import AdapterConfig
from .hyperplanes import along, check_blocks, new_normals, unit
from .layer import AdapterLinear
from .registration import register
from .tuner import AdapterTuner


@final
@dataclass
class EtherPlusConfig(AdapterConfig):
    """ETHER+: W' = G W H, each of G and H block-diagonal of I - u uᵀ / |u|² + v vᵀ / |v|².

    W is outputs x inputs, as torch has it: H changes the inputs, G the outputs; the bias stays. Two vectors of the
    length of the inputs and two of that of the outputs train for each layer. v begins as -u, so that training begins
    at the base model.

    The blocks of H are blocks of columns of W, each with its own u and v, as in the paper. The authors' code
    reshapes W there so that each block of rows gets one H_i for all its columns.

    Args:
        num_blocks: blocks of H and of G; divides inputs and outputs of every layer into blocks of two or more.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from gradselect.adapters import EtherPlusConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
        >>> model = get_peft_model(model, EtherPlusConfig(target_modules=["0"], num_blocks=2))
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        20

    Reference: Bini, Roth, Akata, Khoreva, "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane
    Reflections", arXiv 2405.20271, section 3.3.
    """

    method: ClassVar[str] = "etherplus"

    num_blocks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("num_blocks", self.num_blocks)


@final
class EtherPlusLinear(AdapterLinear):
    """A linear layer with bent inputs and outputs: y = G W H x + b."""

    adapter_layer_names = ("etherplus_in_u", "etherplus_in_v", "etherplus_out_u", "etherplus_out_v")

    def add(self, adapter: str, config: EtherPlusConfig) -> None:
        check_blocks(config.num_blocks, self.path, inputs=self.in_features, outputs=self.out_features)
        for side, size in (("in", self.in_features), ("out", self.out_features)):
            normals = new_normals(size, config.num_blocks)
            getattr(self, f"etherplus_{side}_u")[adapter] = normals
            getattr(self, f"etherplus_{side}_v")[adapter] = Parameter(-normals.detach())

    def before(self, adapter: str, x: Tensor) -> Tensor:
        return _plus_change(x, self._units("in", adapter))

    def after(self, adapter: str, y: Tensor, x: Tensor) -> Tensor:
        return _plus_change(y, self._units("out", adapter), offset=self._bias)

    def transformed(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        right = _plus_change(weight, self._units("in", adapter, dtype=weight.dtype))
        return _plus_change(right.T, self._units("out", adapter, dtype=weight.dtype)).T, bias

    def _units(self, side: str, adapter: str, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        u, v = (getattr(self, f"etherplus_{side}_{name}")[adapter].to(dtype=dtype) for name in "uv")
        return unit(u), unit(v)


def _plus_change(x: Tensor, units: tuple[Tensor, Tensor], *, offset: Tensor | None = None) -> Tensor:
    """Return x + (v vᵀ - u uᵀ)(x - offset). The two products are subtracted first: at u = -v nothing is rounded."""
    u, v = units
    wide = x.to(u.dtype)
    moved = wide if offset is None else wide - offset.to(u.dtype)
    return (wide + (along(moved, v) - along(moved, u))).to(x.dtype)


@final
class EtherPlusModel(AdapterTuner):
    """PEFT's side of ETHER+."""

    prefix = "etherplus_"
    tuner_layer_cls = EtherPlusLinear


register(EtherPlusConfig, EtherPlusModel)
