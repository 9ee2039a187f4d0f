"""Share of the gradient's energy in its largest entries, in the rotated and in the plain basis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from gradselect.usage import check_positive

from .conversion import rotated_layers
from .gradients import Loss, visit_gradients


@dataclass(frozen=True, kw_only=True)
class EnergyShare:
    """Share of Σ g² in the largest entries of one layer's gradients, as a mean over batches.

    Attributes:
        layer: name of the linear layer.
        density: share of the entries that count as largest.
        rotated: share of the energy in the basis of the layer's parameter.
        original: share of the energy in the basis of the plain layer.

    Example:
        >>> EnergyShare(layer="layers.0.up", density=0.01, rotated=0.9, original=0.25).rotated
        0.9
    """

    layer: str
    density: float
    rotated: float
    original: float


def energy(
    model: nn.Module, batches: Iterable[Any], *, densities: Sequence[float] = (0.01,), loss: Loss | None = None
) -> list[EnergyShare]:
    r"""Measure the share of Σ g² in the largest entries of the gradient, for each rotated layer in both bases.

    The share is Σ of the `density` largest g² / Σ g², for the gradient G̃ = V G Uᵀ of a batch and for G = Vᵀ G̃ U. To
    judge the bases, use batches that they were not estimated from.

    Args:
        model: a converted model; stays unchanged.
        batches: for `model(**batch).loss`, as in `convert`.
        densities: in (0, 1].
        loss: (model, batch) -> scalar, as in `convert`.

    Returns:
        A row per layer and density, in model order. Gradients of zeros are skipped.

    Raises:
        UsageError: no rotated layer, no batch, no loss.

    Example:
        >>> import torch
        >>> import gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> batches, loss = [torch.ones(2, 8)], lambda model, batch: model(batch).square().mean()
        >>> mask = gs.sparsegrad.convert(model, batches, loss=loss)
        >>> shares = gs.sparsegrad.energy(model, batches, densities=(0.1,), loss=loss)
        >>> all(share.rotated > share.original for share in shares)
        True
    """
    for density in densities:
        check_positive("densities", density, at_most=1, example=0.01)
    layers = rotated_layers(model)
    shares: dict[tuple[str, float], list[tuple[float, float]]] = {}

    def visit(name: str, gradient: Tensor) -> None:
        if not bool(gradient.any()):
            return
        gradient = gradient.float()
        original = layers[name].bases.restore(gradient)
        for density in densities:
            pair = energy_share(gradient, density), energy_share(original, density)
            shares.setdefault((name, density), []).append(pair)

    weights = {name: layer.rotated_weight for name, layer in layers.items()}
    visit_gradients(model, weights, batches, loss=loss, visit=visit)
    return [
        EnergyShare(
            layer=name,
            density=density,
            rotated=fmean(rotated for rotated, _ in shares[name, density]),
            original=fmean(original for _, original in shares[name, density]),
        )
        for name in layers
        for density in densities
        if (name, density) in shares
    ]


def energy_share(gradient: Tensor, density: float) -> float:
    """Return the share of Σ g² in the max(1, round(density n)) largest of n entries."""
    squares = gradient.flatten().double().square()
    count = max(1, round(density * squares.numel()))
    return float(squares.topk(count).values.sum() / squares.sum())
