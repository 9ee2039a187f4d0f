"""The linear layers of a model that can be rotated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.blocks import Layout
from gradselect.entries import say_left_out
from gradselect.slices import check_whole_layers
from gradselect.usage import UsageError, as_tuple, beginnings, matching

from .rotated import RotatedLinear

NOT_OF_MLP = ("attn", "attention", "router", "lora_")
"""Parts of module names or classes that show, on the path to a linear layer, that it does not belong to an MLP."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer inside one of the model's repeated layers.

    Attributes:
        name: name of the module, e.g. "model.layers.3.mlp.up_proj".
        kind: layers of one kind share bases, e.g. "mlp up_proj 1066x128".
        number: number of the repeated layer around it.
        of_mlp: False if it belongs to attention, a router or an adapter.
        module: an `nn.Linear`, or transformers' `Conv1D`.
    """

    name: str
    kind: str
    number: int
    of_mlp: bool
    module: nn.Module

    @property
    def weight(self) -> Parameter:
        """The weight of the module, in its own shape."""
        assert isinstance(self.module.weight, Parameter)
        return self.module.weight

    @property
    def weight_name(self) -> str:
        """Name of the weight in `model.named_parameters()`."""
        return f"{self.name}.weight"

    @property
    def matrix(self) -> Tensor:
        """The weight as W of y = x Wᵀ: shape (D_out, D_in)."""
        return self.turned(self.weight)

    def turned(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape in the shape of W; `Conv1D` keeps Wᵀ."""
        return tensor if isinstance(self.module, nn.Linear) else tensor.T


def choose_layers(model: nn.Module, *, layers: str | Sequence[str] | None, every: int) -> list[LinearLayer]:
    """Return the linear layers to rotate, in model order. `convert` explains the arguments.

    Raises:
        UsageError: there is none, a pattern matches none, or a named layer cannot be rotated.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        >>> [layer.name for layer in choose_layers(model, layers=None, every=2)]
        ['0', '2']
    """
    known = linears_of(model)
    candidates = _of_mlp(model, known) if layers is None else _named(known, as_tuple(layers))
    selected = [layer for layer in candidates if layer.number % every == 0]
    if not selected:
        numbers = sorted({layer.number for layer in candidates})
        raise UsageError(f"every={every} leaves no linear layer, they are in blocks {numbers}; write every=1")
    _refuse_tied(model, selected)
    if layers is None:
        trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        say_left_out(trained, method="SparseGrad")
    return selected


def linears_of(model: nn.Module) -> list[LinearLayer]:
    """Return all linear layers inside the repeated layers, in model order.

    Raises:
        UsageError: a part of the model is rotated or sliced already.
    """
    check_whole_layers(model, to="gs.sparsegrad.convert")
    layout = Layout(model, matrices=None)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, RotatedLinear):
            raise UsageError(f"{name!r} is rotated already; write gs.sparsegrad.fold(model) before converting again")
        layer = layout.component(name)
        if _is_linear(module) and layer in layout.layers:
            number = layout.stacks[layout.layers[layer]].layers[layer]
            inside = name.removeprefix(layer).removeprefix(".")
            found.append(LinearLayer(name, _kind(inside, module), number, _is_of_mlp(model, layer, name), module))
    return found


def _is_linear(module: nn.Module) -> bool:
    # Conv1D by name, because the library does not import transformers.
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and len(_shape(module)) == 2)


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of the weight."""
    assert isinstance(module.weight, Tensor)
    return tuple(module.weight.shape)


def _kind(inside: str, module: nn.Module) -> str:
    """Return path and shape inside the layer, without numbers: all experts are of one kind."""
    words = [word for word in inside.split(".") if not word.isdigit()]
    return " ".join([*words, "x".join(map(str, _shape(module)))])


def _is_of_mlp(model: nn.Module, layer: str, name: str) -> bool:
    """Return True unless a module on the path is attention, router or adapter, or the layer is a gate or has size 1."""
    inside = [path for path in beginnings(name) if len(path) > len(layer)]
    names = [path.rpartition(".")[2] for path in inside]
    classes = [type(model.get_submodule(path)).__name__ for path in inside]
    is_other = any(mark in word.lower() for word in names + classes for mark in NOT_OF_MLP)
    is_gate = names[-1:] == ["gate"] or 1 in _shape(model.get_submodule(name))
    return not is_other and not is_gate


def _of_mlp(model: nn.Module, known: Sequence[LinearLayer]) -> list[LinearLayer]:
    """Return the linear layers of MLPs that can be rotated."""
    of_mlp = [layer for layer in known if layer.of_mlp]
    if not of_mlp:
        raise UsageError(
            f"{type(model).__name__} has no linear layer of an MLP in its repeated layers; "
            f"name some with layers=(...): {', '.join(layer.name for layer in known[:5]) or 'but there is none'}"
        )
    usable = [layer for layer in of_mlp if _fault(layer) is None]
    if not usable:
        raise UsageError(
            f"none of the {len(of_mlp)} linear layers of MLPs can be rotated; the first {_fault(of_mlp[0])}"
        )
    return usable


def _named(known: Sequence[LinearLayer], patterns: Sequence[str]) -> list[LinearLayer]:
    """Return the layers that match the patterns; refuse those that cannot be rotated."""
    if not patterns:
        raise UsageError('layers=() names no layer; write layers=None, or e.g. layers=("*.up_proj", "*.down_proj")')
    names = matching([layer.name for layer in known], patterns, key="layers", kind="linear in the repeated layers")
    selected = [layer for layer in known if layer.name in names]
    for layer in selected:
        if (fault := _fault(layer)) is not None:
            raise UsageError(f"layers: {layer.name!r} {fault}")
    return selected


def _fault(layer: LinearLayer) -> str | None:
    """Return the reason why the layer cannot be rotated, or None."""
    weight, kind = layer.module.weight, type(layer.module)
    if type(weight) is not Parameter or weight.dtype not in DTYPES:
        return f"is quantised or sharded ({type(weight).__name__}); load the model in bf16 or fp32, unsharded"
    if getattr(weight, "gradselect_owner", None) is not None:
        return "is trained by an optimizer; convert before building one, or close() that one"
    if not weight.requires_grad:
        return "is frozen; call requires_grad_(True) on it, or leave it out"
    if isinstance(layer.module, nn.Linear) and kind.forward is not nn.Linear.forward:
        return f"is a {kind.__name__}, which computes more than x Wᵀ + b; leave it out"
    return None


def _refuse_tied(model: nn.Module, layers: Sequence[LinearLayer]) -> None:
    names: dict[Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for layer in layers:
        if len(known := names[layer.weight]) > 1:
            raise UsageError(
                f"{' and '.join(known)} are one tensor, so one cannot be rotated without the other; untie them"
            )
