"""A linear layer that stores its weight in another basis."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional


class Bases(nn.Module):
    """Orthogonal bases of both sides of a weight, shared by all layers of one kind.

    This is one module, a child of the first of these layers, instead of buffers in each: moving the model does not
    copy the bases, and a checkpoint holds them once.

    Args:
        output: V in the paper, rows are basis vectors; shape (D_out, D_out), e.g. (1066, 1066).
        input: U in the paper, rows are basis vectors; shape (D_in, D_in), e.g. (128, 128).
    """

    output: Tensor
    input: Tensor

    def __init__(self, *, output: Tensor, input: Tensor) -> None:
        super().__init__()
        self.register_buffer("output", output)
        self.register_buffer("input", input)

    def rotate(self, weight: Tensor) -> Tensor:
        """Return V W Uᵀ, computed as V⁻ᵀ W U⁻¹ in fp32 or wider, in W's shape (D_out, D_in) and dtype.

        The inverses matter for bf16: its bases are orthogonal to three digits only, and the layer must stay the same
        function with those bases.
        """
        wide = _wide(weight.dtype)
        of_output = torch.linalg.solve(self.output.T.to(wide), weight.to(wide))
        return torch.linalg.solve(self.input.to(wide), of_output, left=False).to(weight.dtype)

    def restore(self, rotated: Tensor) -> Tensor:
        """Return Vᵀ W̃ U, the inverse of `rotate`; computed in fp32 or wider, in W̃'s dtype."""
        wide = _wide(rotated.dtype)
        return (self.output.T.to(wide) @ rotated.to(wide) @ self.input.to(wide)).to(rotated.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class RotatedLinear(nn.Module):
    r"""A linear layer, y = x Wᵀ + b, computed as y = (x Uᵀ) W̃ᵀ V + b with the parameter W̃ = V W Uᵀ.

    The function is the same because U and V are orthogonal, but an optimizer sees the gradient V (∂L/∂W) Uᵀ. The bias
    stays unrotated. T tokens cost 2 T (D_in² + D_out²) extra multiplications, forward and backward. If that is more
    than 2 D_in D_out (D_in + D_out), the layer computes y = x (Vᵀ W̃ U)ᵀ + b instead, and the backward pass keeps the
    plain weight in memory; our choice.

    A state dict holds `rotated_weight`, from which training resumes bit by bit, and `weight`, the plain W. So a plain
    model can load the checkpoint of a converted one, and a converted model can load a plain checkpoint, which it
    rotates.

    Args:
        plain: an `nn.Linear`, or transformers' `Conv1D`, whose weight is Wᵀ. Emptied here; `unrotated` fills it again.
        bases: bases of this kind of layer.
        owns_bases: True for the first layer of the kind: the bases are its child module.

    Example:
        >>> import torch
        >>> plain, inputs = torch.nn.Linear(2, 3), torch.ones(1, 2)
        >>> wanted = plain(inputs)
        >>> bases = Bases(output=torch.eye(3).flip(0), input=torch.eye(2).flip(0))
        >>> torch.allclose(RotatedLinear(plain, bases=bases, owns_bases=True)(inputs), wanted)
        True

    Reference: Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers",
        arXiv 2410.07383, section 3.
    """

    checkpoint_names: Mapping[str, str] = MappingProxyType({"rotated_weight": "weight"})

    rotated_weight: Parameter
    bias: Parameter | None

    def __init__(self, plain: nn.Module, *, bases: Bases, owns_bases: bool) -> None:
        super().__init__()
        weight, bias = plain.weight, plain.bias
        assert isinstance(weight, Parameter)
        assert bias is None or isinstance(bias, Parameter)
        self.transposed = not isinstance(plain, nn.Linear)
        # Tuples hide these modules from the module tree: the bases may be another layer's, and `plain` is empty.
        self._bases = (bases,)
        self._shell = (plain,)
        if owns_bases:
            self.add_module("shared_bases", bases)
        self.rotated_weight = Parameter(bases.rotate(self.turned(weight.detach())), requires_grad=weight.requires_grad)
        self.bias = bias
        for name in ("weight", "bias"):
            plain.register_parameter(name, None)
        self.train(plain.training)
        self.register_state_dict_post_hook(_add_plain_weight)
        self.register_load_state_dict_pre_hook(_take_plain_weight)

    @property
    def bases(self) -> Bases:
        """The bases U and V."""
        return self._bases[0]

    @property
    def weight(self) -> Tensor:
        """The weight of the plain layer, in its shape; computed at each access."""
        return self.turned(self.bases.restore(self.rotated_weight)).contiguous()

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., D_in) to (..., D_out)."""
        input, output = self.bases.input, self.bases.output
        num_outputs, num_inputs = self.rotated_weight.shape
        num_tokens = hidden.numel() // num_inputs
        if num_tokens * (num_inputs**2 + num_outputs**2) > num_inputs * num_outputs * (num_inputs + num_outputs):
            return functional.linear(hidden, output.T @ self.rotated_weight @ input, self.bias)
        rotated = functional.linear(functional.linear(hidden, input), self.rotated_weight)
        return functional.linear(rotated, output.T, self.bias)

    def unrotated(self) -> nn.Module:
        """Return the original plain layer with the current weights. Do not use this layer afterwards."""
        (plain,) = self._shell
        weight = Parameter(self.weight.detach(), requires_grad=self.rotated_weight.requires_grad)
        plain.register_parameter("weight", weight)
        plain.register_parameter("bias", self.bias)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Return the sizes, as `nn.Linear` does."""
        num_outputs, num_inputs = self.rotated_weight.shape
        return f"in_features={num_inputs}, out_features={num_outputs}, bias={self.bias is not None}"

    def turned(self, weight: Tensor) -> Tensor:
        """Turn a tensor from the plain layer's shape to (D_out, D_in), or back."""
        return weight.T if self.transposed else weight


def _add_plain_weight(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    assert isinstance(module, RotatedLinear)
    state_dict[f"{prefix}weight"] = module.weight.detach()


def _take_plain_weight(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rotate the weight of a plain state dict while loading it."""
    assert isinstance(module, RotatedLinear)
    plain = state_dict.pop(f"{prefix}weight", None)
    if plain is not None and f"{prefix}rotated_weight" not in state_dict:
        on_device = plain.to(module.rotated_weight.device)
        state_dict[f"{prefix}rotated_weight"] = module.bases.rotate(module.turned(on_device))
        # A plain checkpoint has no bases: those that rotated the weight stay, and are not missing.
        for name, bases in module.named_children():
            for key, values in bases.state_dict().items():
                state_dict.setdefault(f"{prefix}{name}.{key}", values)
