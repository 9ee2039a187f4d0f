"""Plain linear layers into sliced ones, and back."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn import Parameter

from gradselect.parallel import is_dtensor
from gradselect.usage import UsageError

from .shared_inputs import SharedInputs
from .sliced_linear import NO_SHARDS, SlicedLinear, cut, join
from .sliced_product import COLUMNS, ROWS

DIMS = {"columns": COLUMNS, "rows": ROWS}


def sliced_linears(model: nn.Module) -> dict[str, SlicedLinear]:
    """Return the sliced linear layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SlicedLinear)}


def slice_linear(linear: nn.Linear, *, by: str, parts: int, shared: SharedInputs | None = None) -> None:
    """Cut the weight of a plain linear layer into `parts` slices, in place. The object, its hooks and bias stay.

    Args:
        linear: of the class `nn.Linear` itself, or a sliced one, which is cut anew unless it is cut like this.
        by: "columns" or "rows" of the weight.
        parts: number of slices, at most the number of columns or rows.
        shared: keeps one copy of an input for all layers that read it.

    Raises:
        UsageError: the weight is sharded, or an optimizer holds it.
    """
    if isinstance(linear, SlicedLinear):
        linear.settle()
        if (linear.kind, len(linear.slice_names)) == (by, parts):
            return
        check_free(linear, to=f'partition(model, by="{by}", parts={parts})')
        join(linear)
    check_free(linear, to=f'partition(model, by="{by}", parts={parts})')
    weight = linear.weight
    if is_dtensor(weight) or type(weight) is not Parameter:
        raise UsageError(
            f"a weight is sharded or of a special class ({type(weight).__name__}) and cannot be cut. {NO_SHARDS}"
        )
    cut(linear, dim=DIMS[by], parts=parts, shared=shared or SharedInputs())


def size_of(linear: nn.Linear, *, by: str) -> int:
    """Number of columns or rows of the weight."""
    return linear.in_features if by == "columns" else linear.out_features


def inputs_shared_by(linears: Iterable[nn.Linear]) -> SharedInputs:
    """Return the keeper of inputs of those that are sliced already; else a new one, for all linears of a layer."""
    return next((each.shared_inputs for each in linears if isinstance(each, SlicedLinear)), SharedInputs())


def join_slices(model: nn.Module) -> int:
    """Turn every sliced linear layer of a model into a plain `nn.Linear` again, in place.

    The layers stay the same objects with the same hooks, and `weight` is one parameter again, trainable if a slice was.
    Values do not change; gradients of slices are dropped. Close optimizers of the slices first. To save a model, there
    is no need to join: state dicts hold plain names.

    Returns:
        Number of layers.

    Raises:
        UsageError: the model has no sliced layer, or an optimizer still owns the slices.

    Example:
        >>> import torch
        >>> import gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> len(gs.partition(model, by="columns", parts=4))
        15
        >>> gs.join_slices(model), type(model[0])
        (3, <class 'torch.nn.modules.linear.Linear'>)
    """
    found = sliced_linears(model)
    if not found:
        raise UsageError(
            f'{type(model).__name__} has no slices to join; partition(model, by="columns", parts=8) makes them'
        )
    check_free(model, to="gs.join_slices")
    for linear in found.values():
        join(linear)
    return len(found)


def check_free(model: nn.Module, *, to: str) -> None:
    """Check that no optimizer owns a weight.

    Raises:
        UsageError: one does.
    """
    if any("gradselect_owner" in vars(parameter) for parameter in model.parameters()):
        raise UsageError(f"an optimizer holds the model, and {to} replaces parameters; call optimizer.close() first")


def check_whole_layers(model: nn.Module, *, to: str) -> None:
    """Check that no linear layer is sliced.

    Raises:
        UsageError: one is; says what needs whole weights.
    """
    if found := sliced_linears(model):
        raise UsageError(
            f"{len(found)} linear layers are cut into slices, {next(iter(found))!r} first, and {to} needs whole "
            "weights; call gs.join_slices(model) first"
        )
