"""Bases that concentrate the gradients of layers of one kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.usage import UsageError

from .gradients import Loss, visit_gradients
from .layers import LinearLayer
from .rotated import Bases


class GramMatrices:
    r"""Σ G Gᵀ and Σ Gᵀ G over gradients G of one shape.

    Their eigenvectors are the left singular vectors of the two unfoldings of the stacked gradients: the HOSVD of the
    paper. Memory is D_out² + D_in² entries for any number of gradients.

    Args:
        like: a weight of shape (D_out, D_in), e.g. (1066, 128). Gives the device, and the dtype if wider than fp32.

    Reference: De Lathauwer, De Moor, Vandewalle, "A multilinear singular value decomposition", 2000, property 5.
    """

    def __init__(self, like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.output, self.input = (torch.zeros(size, size, dtype=dtype, device=like.device) for size in like.shape)

    def add(self, gradient: Tensor) -> None:
        """Add a gradient of shape (D_out, D_in)."""
        gradient = gradient.to(self.output.dtype)
        self.output.addmm_(gradient, gradient.T)
        self.input.addmm_(gradient.T, gradient)

    def bases(self, *, dtype: torch.dtype) -> Bases:
        """Return both bases in `dtype`, directions of largest energy first."""
        return Bases(output=principal_axes(self.output).to(dtype), input=principal_axes(self.input).to(dtype))


def principal_axes(gram: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix as rows, by descending eigenvalue, in fp64.

    fp64 makes the rows orthogonal to the last bit of fp32; a rotated layer is only as exact as that. It runs once.
    Squaring blurs the smallest axes, which is harmless: they hold no energy.
    """
    return torch.linalg.eigh(gram.double()).eigenvectors.flip(1).T.contiguous()


def estimate_bases(
    model: nn.Module, layers: Sequence[LinearLayer], batches: Iterable[Any], *, loss: Loss | None
) -> Mapping[str, Bases]:
    """Return bases by kind of layer, from the gradients of the unchanged model on the batches.

    Raises:
        UsageError: no batch, no loss, or gradients that are all zero or not finite.
    """
    by_weight = {layer.weight_name: layer for layer in layers}
    grams = {layer.kind: GramMatrices(layer.matrix) for layer in layers}

    def visit(name: str, gradient: Tensor) -> None:
        layer = by_weight[name]
        grams[layer.kind].add(layer.turned(gradient))

    weights: dict[str, Parameter] = {name: layer.weight for name, layer in by_weight.items()}
    visit_gradients(model, weights, batches, loss=loss, visit=visit)
    for layer in layers:
        energy = float(grams[layer.kind].input.trace())
        if not 0 < energy < float("inf"):
            raise UsageError(
                f"the gradients of {layer.name!r} and layers of its kind have energy {energy} over these batches; "
                "give batches whose loss is finite and depends on these layers, or leave them out of layers="
            )
    dtypes = {layer.kind: layer.weight.dtype for layer in layers}
    return {kind: gram.bases(dtype=dtypes[kind]) for kind, gram in grams.items()}
