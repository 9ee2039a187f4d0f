"""Conversion of linear layers to rotated ones, and back."""

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
    r"""Rotate linear layers of `model`, in place, into a basis that concentrates the gradient in few entries.

    G are the gradients of all layers of one kind over all batches. The rows of V are the eigenvectors of Σ G Gᵀ, those
    of U the eigenvectors of Σ Gᵀ G. Each layer W becomes W̃ = V W Uᵀ, and y = (x Uᵀ) W̃ᵀ V + b: the same function up to
    rounding. This trains nothing. Layers with the same name within a block and the same shape are of one kind.

    The paper shares bases among all layers of one shape, and rotates only the up and down projections of LLaMA-2. Bases
    by name and shape, gate projections and evaluation mode are our choices.

    Call `convert` before building the optimizer. Call `fold` before using the model as a plain one.

    Args:
        model: its repeated layers hold `nn.Linear` or transformers' `Conv1D`.
        batches: for `model(**batch).loss`, on the model's device; iterated once.
        density: share of the entries of each rotated weight that trains in a step, in (0, 1].
        layers: names or globs of linear layers inside the repeated layers, e.g. `("*.up_proj", "*.down_proj")`. None:
            the trainable ones of the MLPs, without those of attention, routers or adapters.
        every: rotate only in blocks 0, `every`, 2 `every`, ...; the paper takes every third of LLaMA-2.
        loss: (model, batch) -> scalar, for other models and batches.

    Returns:
        The mask of the rotated weights, for `SparseOptimizer(model, mask=...)`.

    Raises:
        UsageError: no such layer, or one that is tied, frozen, quantised or rotated already; no batch, no loss.

    Example:
        >>> import torch
        >>> import gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> loss = lambda model, batch: model(batch).square().mean()
        >>> mask = gs.sparsegrad.convert(model, [torch.ones(2, 8)], density=0.1, loss=loss)
        >>> optimizer = gs.SparseOptimizer(model, mask=mask, lr=2e-4)
        >>> optimizer.close()  # after training
        >>> gs.sparsegrad.fold(model)
        3

    Reference: Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers",
        arXiv 2410.07383.
    """
    check_positive("density", density, at_most=1, example=0.01)
    check_whole("every", every)
    selected = choose_layers(model, layers=layers, every=every)
    bases = estimate_bases(model, selected, batches, loss=loss)
    owners = {layer.kind: layer for layer in reversed(selected)}
    for layer in selected:
        rotated = RotatedLinear(layer.module, bases=bases[layer.kind], owns_bases=owners[layer.kind] is layer)
        _replace(model, layer.name, rotated)
    return TopGradient(density=density, among=tuple(f"{layer.name}.rotated_weight" for layer in selected))


def fold(model: nn.Module) -> int:
    """Turn every `RotatedLinear` of `model`, in place, back into its plain layer, with W = Vᵀ W̃ U.

    Class, names, dtype and device return, so a state dict has the keys of the unconverted model. Close optimizers over
    the rotated weights first, and remove hooks on the rotated layers: they do not move to the plain ones.

    Returns:
        Number of layers.

    Raises:
        UsageError: the model has no rotated layer.

    Example:
        >>> import torch
        >>> import gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> _ = gs.sparsegrad.convert(model, [torch.ones(2, 8)], loss=lambda model, batch: model(batch).square().mean())
        >>> gs.sparsegrad.fold(model), type(model[0])
        (3, <class 'torch.nn.modules.linear.Linear'>)
    """
    rotated = rotated_layers(model)
    for name, layer in rotated.items():
        _replace(model, name, layer.unrotated())
    return len(rotated)


def rotated_layers(model: nn.Module) -> dict[str, RotatedLinear]:
    """Return every `RotatedLinear` of the model by its name.

    Raises:
        UsageError: the model has none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, RotatedLinear)}
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no rotated linear layer; call gs.sparsegrad.convert(model, ...) first"
        )
    return found


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    setattr(model.get_submodule(parent(name)), name.rpartition(".")[2], module)
