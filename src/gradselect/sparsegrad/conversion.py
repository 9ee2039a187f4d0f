"""From plain linears to rotated ones, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from gradselect.masks import TopGradient
from gradselect.usage import UsageError, check_positive, check_whole, parent

from .bases import estimate_bases
from .gradients import Loss
from .layers import choose_layers
from .rotated import RotatedLinear


def convert(
    model: nn.Module,
    batches: Iterable[Any],
    density: float = 0.01,
    *,
    layers: str | Sequence[str] | None = None,
    every: int = 1,
    loss: Loss | None = None,
) -> TopGradient:
    r"""Rotate linears of `model`, in place, into a basis in which few entries of the gradient matter.

    With G the gradients of all layers of one kind over all batches, V has the eigenvectors of Σ G Gᵀ and U those of
    Σ Gᵀ G as rows. Each layer W becomes W̃ = V W Uᵀ, and y = (x Uᵀ) W̃ᵀ V + b: the same function up to rounding.
    Nothing is trained meanwhile. Layers of the same name within a block and the same shape are of one kind.

    The paper shares bases among all layers of one shape, and of LLaMA-2 rotates up and down projections only; bases by
    name and shape, gate projections and evaluation mode are our choices.

    Convert before making the optimizer, and `fold` before using the model as a plain one.

    Args:
        model: its repeated layers hold `nn.Linear` or transformers' `Conv1D`.
        batches: for `model(**batch).loss`, on the model's device; read once.
        density: share of the entries of each rotated weight that moves at a step, in (0, 1].
        layers: names or globs of linears in the repeated layers, e.g. `("*.up_proj", "*.down_proj")`; None: those of
            the MLPs that train, thus not attention's, routers' or adapters'.
        every: only in blocks 0, `every`, 2 `every`, ...; the paper takes every third of LLaMA-2.
        loss: (model, batch) -> scalar, for other models and batches.

    Returns:
        The mask of the rotated weights, for `SparseOptimizer(model, mask=...)`.

    Raises:
        UsageError: no such linear, or one that is tied, frozen, quantised or rotated already; no batch, no loss.

    Example:
        mask = gs.sparsegrad.convert(model, batches, density=0.01)
        optimizer = gs.SparseOptimizer(model, mask=mask, lr=1e-4)
        ...  # train
        optimizer.close()
        gs.sparsegrad.fold(model)

    Reference: Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers",
        arXiv 2410.07383.
    """
    check_positive("density", density, at_most=1, example=0.01)
    check_whole("every", every)
    chosen = choose_layers(model, layers=layers, every=every)
    bases = estimate_bases(model, chosen, batches, loss=loss)
    owners = {layer.kind: layer for layer in reversed(chosen)}
    for layer in chosen:
        rotated = RotatedLinear(layer.module, bases=bases[layer.kind], owns_bases=owners[layer.kind] is layer)
        _replace(model, layer.name, rotated)
    return TopGradient(density=density, among=tuple(f"{layer.name}.rotated_weight" for layer in chosen))


def fold(model: nn.Module) -> int:
    """Turn every `RotatedLinear` of `model`, in place, back into the plain layer it was, with W = Vᵀ W̃ U.

    Class, names, dtype and device are as they were, so a state dict has the keys of the unconverted model. Hooks on the
    rotated layers and optimizers over their weights do not follow: close those first.

    Returns:
        How many there were.

    Raises:
        UsageError: there is none.
    """
    rotated = rotated_layers(model)
    for name, layer in rotated.items():
        _replace(model, name, layer.unrotated())
    return len(rotated)


def rotated_layers(model: nn.Module) -> dict[str, RotatedLinear]:
    """Every `RotatedLinear` by its name.

    Raises:
        UsageError: there is none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, RotatedLinear)}
    if not found:
        raise UsageError(f"{type(model).__name__} has no rotated linear; call gs.sparsegrad.convert(model, ...) first")
    return found


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    setattr(model.get_submodule(parent(name)), name.rpartition(".")[2], module)
