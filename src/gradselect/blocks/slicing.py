"""Slices of the linear layers of a model: which layers are cut, and the names of the slices."""

from __future__ import annotations

import logging

from torch import nn
from torch.nn import Parameter
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradselect.core import is_frozen_for_now
from gradselect.slices import SlicedLinear, inputs_shared_by, size_of, slice_linear
from gradselect.usage import UsageError, beginnings, check_whole, join

from .structure import Layout

logger = logging.getLogger(__name__)

DEFAULT_PARTS = 8
"""Slices of a layer."""


def check_parts(parts: int | None, *, by: str) -> None:
    """Check the number of slices.

    Raises:
        UsageError: it is no whole number from 2 on, or blocks are no slices.
    """
    if parts is None:
        return
    if by not in ("columns", "rows"):
        raise UsageError(
            f'parts={parts!r} is a number of slices, and by="{by}" makes none; write by="columns" or by="rows", or '
            "leave parts out"
        )
    check_whole("parts", parts, least=2)


def slice_layers(model: nn.Module, *, by: str, parts: int) -> None:
    """Cut the plain linear layers inside the layers of a model, in place, unless they are cut like this already.

    Raises:
        UsageError: a layer that trains has none, all are too small, the model is wrapped or sharded, or an optimizer
            holds it.
    """
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise UsageError(
            f"{type(model).__name__} has wrapped the model already, and would not average the gradients of slices; "
            f'call partition(model, by="{by}") first, then wrap the model'
        )
    by_layer = linears_of_layers(model)
    small: list[str] = []
    for layer, linears in by_layer.items():
        fitting = {name: each for name, each in linears.items() if size_of(each, by=by) >= parts}
        small += [name for name in linears if name not in fitting]
        if not fitting:
            raise UsageError(_nothing_to_cut(model, layer, linears, by=by, parts=parts))
        inputs = inputs_shared_by(fitting.values())
        for each in fitting.values():
            slice_linear(each, by=by, parts=parts, shared=inputs)
    if small:
        logger.warning(
            "%d linear layers have fewer %s than %d parts and stay whole, blocks of their own: %s%s",
            *(len(small), by, parts, ", ".join(small[:3]), ", ..." if small[3:] else ""),
        )


def linears_of_layers(model: nn.Module) -> dict[str, dict[str, nn.Linear]]:
    """Return the linear layers that can be cut, by path, by the path of each layer that trains.

    They are of the class `nn.Linear` itself, train, belong to no adapter, and share their weight with nothing.
    """
    layout = Layout(model, matrices=None)
    adapters = {path for path, module in model.named_modules() if _is_adapter(module)}
    num_uses: dict[Parameter, int] = {}
    found: dict[str, dict[str, nn.Linear]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        num_uses[parameter] = num_uses.get(parameter, 0) + 1
        if (layer := layout.component(name)) in layout.layers and _trains(parameter):
            found.setdefault(layer, {})
    for path, module in model.named_modules():
        layer = layout.component(path)
        if layer not in found or type(module) not in (nn.Linear, SlicedLinear):
            continue
        weights = [each for name, each in module.named_parameters(recurse=False) if name != "bias"]
        is_own = all(num_uses[each] == 1 and _trains(each) for each in weights)
        if weights and is_own and adapters.isdisjoint(beginnings(path)):
            assert isinstance(module, nn.Linear)
            found[layer][path] = module
    return found


def slice_names(model: nn.Module) -> dict[str, str]:
    """Return the block inside its layer, "columns.3", of every slice, by each name of the parameter."""
    return {
        join(path, name): name.removeprefix("weight_").replace("_", ".")
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SlicedLinear)
        for name in module.slice_names
    }


def _trains(parameter: Parameter) -> bool:
    return parameter.requires_grad or is_frozen_for_now(parameter)


def _is_adapter(module: nn.Module) -> bool:
    # By class name: the library does not import PEFT.
    return any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__)


def _nothing_to_cut(model: nn.Module, layer: str, linears: dict[str, nn.Linear], *, by: str, parts: int) -> str:
    if linears:
        most = max(size_of(each, by=by) for each in linears.values())
        return (
            f"parts={parts} is more than the {most} {by} of any linear layer in {layer!r}; write parts={most} or less"
        )
    kinds = sorted({type(each).__name__ for each in model.get_submodule(layer).modules()})
    return (
        f"{layer!r} has no nn.Linear that can be cut into {by}: one of that class itself that trains, shares its "
        f'weight with nothing and belongs to no adapter; it holds {", ".join(kinds)}. Write by="matrix" or by="layer"'
    )
