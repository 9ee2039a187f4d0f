"""Block: a named set of parameters that is selected as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import Parameter

from gradselect.parallel import local_part


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Named set of parameters that is trained or frozen as a whole.

    Args:
        name: unique in its model: "embedding", "layer.0", "layer.1", ..., "norm", "head".
        parameters: the tensors, in the order of `model.named_parameters()`; a tied tensor is in one block only.
        parameter_names: their names in `model.named_parameters()`, in the same order.
        aliases: other names that a user may write for this block: `("head",)` for an embedding with a tied head.
        over_vocabulary: True for an embedding of tokens, and for a head that returns a logit for each of them.

    Example:
        >>> import torch
        >>> head = Block(name="head", parameters=(Parameter(torch.zeros(2, 3)),), parameter_names=("head.weight",))
        >>> head.num_elements
        6
    """

    name: str
    parameters: tuple[Parameter, ...]
    parameter_names: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    over_vocabulary: bool = False

    @property
    def num_elements(self) -> int:
        """Number of entries in the block."""
        return sum(parameter.numel() for parameter in self.parameters)


def num_bytes(tensor: Tensor) -> int:
    """Bytes of the local part of a tensor."""
    return local_part(tensor).numel() * tensor.element_size()
