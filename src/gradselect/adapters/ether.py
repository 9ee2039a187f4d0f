"""ETHER: the inputs of a layer reflected at learned hyperplanes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor
from torch.nn import ParameterDict

from gradselect.usage import check_whole

from .config import AdapterConfig
from .hyperplanes import along, check_blocks, new_normals, unit
from .layer import AdapterLinear
from .registration import register
from .tuner import AdapterTuner


@final
@dataclass
class EtherConfig(AdapterConfig):
    """ETHER: W' = W H with the reflection H = diag(H_1 .. H_n), H_i = I - 2 u_i u_iᵀ / |u_i|².

    W is outputs x inputs, as torch has it: the paper writes its transpose, and H to the left. One vector of the length
    of the inputs trains for each layer, whatever n is. A reflection is never near the identity: training begins away
    from the base model, and the loss jumps at once.

    The blocks of H are blocks of columns of W, as in the paper. The authors' code reshapes W, so that with n > 1 each
    block of rows gets one H_i for all its columns.

    Args:
        num_blocks: n; divides the inputs of every layer into blocks of two or more. 1: one reflection of all inputs.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from gradselect.adapters import EtherConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
        >>> model = get_peft_model(model, EtherConfig(target_modules=["0"], num_blocks=3))
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        6

    Reference: Bini, Roth, Akata, Khoreva, "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane
    Reflections", arXiv 2405.20271, equations 1 and 2, section 3.4.
    """

    method: ClassVar[str] = "ether"

    num_blocks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("num_blocks", self.num_blocks)


@final
class EtherLinear(AdapterLinear):
    """A linear layer with reflected inputs: y = W H x + b."""

    adapter_layer_names = ("ether_u",)
    ether_u: ParameterDict

    def add(self, adapter: str, config: EtherConfig) -> None:
        check_blocks(config.num_blocks, self.path, inputs=self.in_features)
        self.ether_u[adapter] = new_normals(self.in_features, config.num_blocks)

    def before(self, adapter: str, x: Tensor) -> Tensor:
        units = unit(self.ether_u[adapter])
        wide = x.to(units.dtype)
        return (wide - 2 * along(wide, units)).to(x.dtype)

    def transformed(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight - 2 * along(weight, unit(self.ether_u[adapter].to(weight.dtype))), bias


@final
class EtherModel(AdapterTuner):
    """PEFT's side of ETHER."""

    prefix = "ether_"
    tuner_layer_cls = EtherLinear


register(EtherConfig, EtherModel)
