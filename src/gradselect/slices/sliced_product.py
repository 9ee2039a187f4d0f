"""Product with a weight of which some rows or columns train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import Parameter, functional

from .shared_inputs import Ranges, SharedInputs

COLUMNS, ROWS = 1, 0
"""Dimension of the weight that is cut."""


@dataclass(frozen=True, kw_only=True)
class ActiveSlices:
    """Slices that take part in a pass.

    Args:
        dim: `COLUMNS` or `ROWS`.
        ranges: of the slices that need a gradient; neighbours are merged.
        sizes: sizes of the slices in each range.
        parameters: all slices of the layer.
        shared: keeps the input.
    """

    dim: int
    ranges: Ranges
    sizes: Sequence[Sequence[int]]
    parameters: Sequence[Parameter]
    shared: SharedInputs


class SlicedProduct(Function):
    r"""Computes y = x Wᵀ + b, and in the backward pass the gradients of some slices of W only.

    With G the gradient of y, and S the active columns (or rows) of W:

        dL/dx = G W,   dL/dW[:, S] = Gᵀ x[:, S]   (columns; only x[:, S] is kept)
                       dL/dW[S, :] = G[:, S]ᵀ x   (rows; x is kept)

    The forward pass is that of `functional.linear` on the whole weight, to the bit.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, whole: Tensor, bias: Tensor | None, active: ActiveSlices, *slices: Parameter
    ) -> Tensor:
        y = functional.linear(x, whole, bias)
        ranges = active.ranges if active.dim == COLUMNS else ((0, x.shape[-1]),)
        # Under autocast y has another dtype than the weight, which is cast again in the backward pass: a cast copy of
        # every weight would take memory until then.
        ctx.save_for_backward(whole, *active.shared.take(x, ranges, dtype=y.dtype))
        ctx.active = active
        ctx.versions = [parameter._version for parameter in active.parameters]
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        active: ActiveSlices = ctx.active
        check_versions(active, ctx.versions)
        whole, *inputs = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = flat.mm(whole.to(flat.dtype)).view(ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        of_slices = [each.to(whole.dtype) for each in slice_gradients(flat, inputs, active)]
        return of_input, None, of_bias, None, *of_slices


def slice_gradients(grad: Tensor, inputs: Sequence[Tensor], active: ActiveSlices) -> list[Tensor]:
    """Return the gradients of the active slices, each in memory of its own.

    Args:
        grad: of the output. Shape (tokens, out_features).
        inputs: active columns of the input, or all of it for rows. Shape (tokens, columns).
        active: the slices.
    """
    found: list[Tensor] = []
    for number, ((first, end), sizes) in enumerate(zip(active.ranges, active.sizes, strict=True)):
        gradient, x = (grad, inputs[number]) if active.dim == COLUMNS else (grad[:, first:end], inputs[0])
        product = gradient.t().mm(x)
        # A slice that is freed early must not be kept alive by its neighbours.
        found += [product] if len(sizes) == 1 else [part.clone() for part in product.split(list(sizes), active.dim)]
    return found


def check_versions(active: ActiveSlices, versions: Sequence[int]) -> None:
    """Check that no slice was written to since the forward pass, as autograd does for whole weights.

    Raises:
        RuntimeError: one was.
    """
    if any(parameter._version != known for parameter, known in zip(active.parameters, versions, strict=True)):
        raise RuntimeError(
            "a slice of a linear layer needed for the backward pass has been modified by an in-place operation since "
            "the forward pass; call backward() before optimizer.step()"
        )


def merged(bounds: Sequence[tuple[int, int]]) -> tuple[Ranges, list[list[int]]]:
    """Merge neighbours among ascending ranges; return the merged ranges, and the sizes of the parts of each.

    >>> merged([(0, 3), (3, 6), (9, 11)])
    (((0, 6), (9, 11)), [[3, 3], [2]])
    """
    ranges: list[tuple[int, int]] = []
    sizes: list[list[int]] = []
    for first, end in bounds:
        if ranges and ranges[-1][1] == first:
            ranges[-1] = (ranges[-1][0], end)
            sizes[-1].append(end - first)
        else:
            ranges.append((first, end))
            sizes.append([end - first])
    return tuple(ranges), sizes
