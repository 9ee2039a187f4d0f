"""A linear layer whose weight is kept in another basis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional


class Bases(nn.Module):
    """Orthogonal bases of both sides of a weight, shared by all layers of one kind.

    One module, a child of the first of these layers, not buffers of each: moving the model does not multiply them, and
    a checkpoint holds them once.

    Args:
        output: shape (D_out, D_out), e.g. (1066, 1066), the rows are the basis; V in the paper.
        input: shape (D_in, D_in), e.g. (128, 128), the rows are the basis; U in the paper.
    """

    output: Tensor
    input: Tensor

    def __init__(self, *, output: Tensor, input: Tensor) -> None:
        super().__init__()
        self.register_buffer("output", output)
        self.register_buffer("input", input)

    def rotate(self, weight: Tensor) -> Tensor:
        """V W Uᵀ, that is V⁻ᵀ W U⁻¹, in at least fp32, then in W's dtype; both have shape (D_out, D_in).

        Computed as the latter: bases in bf16 are orthogonal to three digits only, and the layer has to be the same
        function with them as they are.
        """
        wide = _wide(weight.dtype)
        of_output = torch.linalg.solve(self.output.T.to(wide), weight.to(wide))
        return torch.linalg.solve(self.input.to(wide), of_output, left=False).to(weight.dtype)

    def restore(self, rotated: Tensor) -> Tensor:
        """Vᵀ W̃ U in at least fp32, then in W̃'s dtype: what undoes `rotate`."""
        wide = _wide(rotated.dtype)
        return (self.output.T.to(wide) @ rotated.to(wide) @ self.input.to(wide)).to(rotated.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class RotatedLinear(nn.Module):
    r"""A linear layer, y = x Wᵀ + b, computed as y = (x Uᵀ) W̃ᵀ V + b with the parameter W̃ = V W Uᵀ.

    The same function, as U and V are orthogonal; but an optimizer sees the gradient V (∂L/∂W) Uᵀ. The bias stays where
    it was. Of T tokens the detour costs 2 T (D_in² + D_out²) multiplications, forward and backward; where that is more
    than 2 D_in D_out (D_in + D_out), y = x (Vᵀ W̃ U)ᵀ + b is computed instead, and the backward pass holds on to the
    plain weight: choice of ours.

    A state dict holds `rotated_weight`, from which training goes on bit by bit, and `weight`, the plain W. So a plain
    model that loads the checkpoint of a converted one gets the right weights, and a converted model that loads a plain
    checkpoint rotates them.

    Args:
        plain: an `nn.Linear`, or transformers' `Conv1D`, whose weight is Wᵀ. It is emptied; `unrotated` fills it again.
        bases: of this layer's kind.
        owns_bases: whether they are a child of this layer; true for the first of the kind.

    Reference: Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers",
        arXiv 2410.07383, section 3.
    """

    rotated_weight: Parameter
    bias: Parameter | None

    def __init__(self, plain: nn.Module, *, bases: Bases, owns_bases: bool) -> None:
        super().__init__()
        weight, bias = plain.weight, plain.bias
        assert isinstance(weight, Parameter)
        assert bias is None or isinstance(bias, Parameter)
        self.transposed = not isinstance(plain, nn.Linear)
        # In tuples, which hide them from the module tree: another layer's bases, and a layer that holds no tensor.
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
        """U and V."""
        return self._bases[0]

    @property
    def weight(self) -> Tensor:
        """The weight of the plain layer, in its shape; computed at each look."""
        return self.turned(self.bases.restore(self.rotated_weight)).contiguous()

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D_in) to (..., D_out)."""
        input, output = self.bases.input, self.bases.output
        num_outputs, num_inputs = self.rotated_weight.shape
        num_tokens = hidden.numel() // num_inputs
        if num_tokens * (num_inputs**2 + num_outputs**2) > num_inputs * num_outputs * (num_inputs + num_outputs):
            return functional.linear(hidden, output.T @ self.rotated_weight @ input, self.bias)
        rotated = functional.linear(functional.linear(hidden, input), self.rotated_weight)
        return functional.linear(rotated, output.T, self.bias)

    def unrotated(self) -> nn.Module:
        """The plain layer that was replaced, with the weights of now. This layer is of no use afterwards."""
        (plain,) = self._shell
        weight = Parameter(self.weight.detach(), requires_grad=self.rotated_weight.requires_grad)
        plain.register_parameter("weight", weight)
        plain.register_parameter("bias", self.bias)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, as those of `nn.Linear`."""
        num_outputs, num_inputs = self.rotated_weight.shape
        return f"in_features={num_inputs}, out_features={num_outputs}, bias={self.bias is not None}"

    def turned(self, weight: Tensor) -> Tensor:
        """From the plain layer's shape to (D_out, D_in), or back."""
        return weight.T if self.transposed else weight


def _add_plain_weight(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    assert isinstance(module, RotatedLinear)
    state_dict[f"{prefix}weight"] = module.weight.detach()


def _take_plain_weight(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Where a state dict has the plain weight only, it is rotated."""
    assert isinstance(module, RotatedLinear)
    plain = state_dict.pop(f"{prefix}weight", None)
    if plain is not None and f"{prefix}rotated_weight" not in state_dict:
        on_device = plain.to(module.rotated_weight.device)
        state_dict[f"{prefix}rotated_weight"] = module.bases.rotate(module.turned(on_device))
