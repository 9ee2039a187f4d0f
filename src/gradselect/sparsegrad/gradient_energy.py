"""How much of a gradient its largest entries hold, rotated and plain."""

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
    """What the top entries of one layer's gradients hold of Σ g², as a mean over batches.

    Attributes:
        layer: name of the linear.
        density: share of the entries that are looked at.
        rotated: share of the energy in the basis of the layer's parameter.
        original: share of the energy in the basis of the plain layer.
    """

    layer: str
    density: float
    rotated: float
    original: float


def energy(
    model: nn.Module, batches: Iterable[Any], *, densities: Sequence[float] = (0.01,), loss: Loss | None = None
) -> list[EnergyShare]:
    r"""Measure what share of Σ g² the largest entries of the gradient hold, in both bases of each rotated linear.

    Of each gradient G̃ = V G Uᵀ of a batch, and of G = Vᵀ G̃ U: Σ of the `density` largest g² / Σ g². To know whether the
    bases serve, take batches that they were not estimated from.

    Args:
        model: a converted one; it is left as it was.
        batches: for `model(**batch).loss`, as in `convert`.
        densities: in (0, 1].
        loss: (model, batch) -> scalar, as in `convert`.

    Returns:
        A row for each layer and density, in model order. A gradient of zeros does not count.

    Raises:
        UsageError: no rotated linear, no batch, no loss.
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
    """Share of Σ g² in the max(1, round(density n)) largest of n entries."""
    squares = gradient.flatten().double().square()
    count = max(1, round(density * squares.numel()))
    return float(squares.topk(count).values.sum() / squares.sum())
