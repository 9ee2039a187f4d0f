"""Which linears of a model are rotated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.blocks import Layout
from gradselect.usage import UsageError, as_tuple, beginnings, matching

from .rotated import RotatedLinear

BESIDE_THE_MLP = ("attn", "attention", "router", "lora_")
"""What the name or the class of a module on the way to a linear holds if the linear is none of an MLP."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LinearLayer:
    """A linear inside one of the model's repeated layers.

    Attributes:
        name: of the module, e.g. "model.layers.3.mlp.up_proj".
        kind: what layers that share bases have in common, e.g. "mlp up_proj 1066x128".
        number: of the repeated layer it stands in.
        of_mlp: whether it is neither attention's nor a router's nor an adapter's.
        module: an `nn.Linear`, or transformers' `Conv1D`.
    """

    name: str
    kind: str
    number: int
    of_mlp: bool
    module: nn.Module

    @property
    def weight(self) -> Parameter:
        """The module's own, in its own shape."""
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
        """From the weight's shape to that of W; `Conv1D` keeps Wᵀ."""
        return tensor if isinstance(self.module, nn.Linear) else tensor.T


def choose_layers(model: nn.Module, *, layers: str | Sequence[str] | None, every: int) -> list[LinearLayer]:
    """The linears to rotate, in model order.

    Raises:
        UsageError: none is found, a pattern matches none, or one that is named cannot be rotated.
    """
    known = linears_of(model)
    chosen = _of_mlp(model, known) if layers is None else _named(known, as_tuple(layers))
    of_blocks = [layer for layer in chosen if layer.number % every == 0]
    if not of_blocks:
        numbers = sorted({layer.number for layer in chosen})
        raise UsageError(f"every={every} leaves none of the linears, in blocks {numbers}; write every=1")
    _refuse_tied(model, of_blocks)
    return of_blocks


def linears_of(model: nn.Module) -> list[LinearLayer]:
    """All linears in the repeated layers, in model order.

    Raises:
        UsageError: some of the model is rotated already.
    """
    layout = Layout(model, matrices=None)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, RotatedLinear):
            raise UsageError(f"{name!r} is rotated already; write gs.sparsegrad.fold(model) before converting again")
        layer = layout.unit(name)
        if _is_linear(module) and layer in layout.layers:
            number = layout.stacks[layout.layers[layer]].layers[layer]
            inside = name.removeprefix(layer).removeprefix(".")
            found.append(LinearLayer(name, _kind(inside, module), number, _is_of_mlp(model, layer, name), module))
    return found


def _is_linear(module: nn.Module) -> bool:
    """By name for `Conv1D`: transformers is not imported here."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and len(_shape(module)) == 2)


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Of the weight."""
    assert isinstance(module.weight, Tensor)
    return tuple(module.weight.shape)


def _kind(inside: str, module: nn.Module) -> str:
    """From the path inside the layer: numbers, of experts say, make no difference."""
    words = [word for word in inside.split(".") if not word.isdigit()]
    return " ".join([*words, "x".join(map(str, _shape(module)))])


def _is_of_mlp(model: nn.Module, layer: str, name: str) -> bool:
    """Whether no module on the way from the layer to the linear says otherwise, and it maps vectors to vectors."""
    inside = [path for path in beginnings(name) if len(path) > len(layer)]
    names = [path.rpartition(".")[2] for path in inside]
    classes = [type(model.get_submodule(path)).__name__ for path in inside]
    is_beside = any(mark in word.lower() for word in names + classes for mark in BESIDE_THE_MLP)
    is_gate = names[-1:] == ["gate"] or 1 in _shape(model.get_submodule(name))
    return not is_beside and not is_gate


def _of_mlp(model: nn.Module, known: Sequence[LinearLayer]) -> list[LinearLayer]:
    """Those of MLPs that can be rotated."""
    of_mlp = [layer for layer in known if layer.of_mlp]
    if not of_mlp:
        raise UsageError(
            f"{type(model).__name__} has no linear of an MLP in its repeated layers; "
            f"name linears with layers=(...): {', '.join(layer.name for layer in known[:5]) or 'but there is none'}"
        )
    usable = [layer for layer in of_mlp if _fault(layer) is None]
    if not usable:
        raise UsageError(f"none of the {len(of_mlp)} linears of MLPs can be rotated; the first {_fault(of_mlp[0])}")
    return usable


def _named(known: Sequence[LinearLayer], patterns: Sequence[str]) -> list[LinearLayer]:
    """Those that the user named, each of which can be rotated."""
    if not patterns:
        raise UsageError('layers=() names no linear; write layers=None, or e.g. layers=("*.up_proj", "*.down_proj")')
    names = matching([layer.name for layer in known], patterns, key="layers", kind="linear in the repeated layers")
    chosen = [layer for layer in known if layer.name in names]
    for layer in chosen:
        if (fault := _fault(layer)) is not None:
            raise UsageError(f"layers: {layer.name!r} {fault}")
    return chosen


def _fault(layer: LinearLayer) -> str | None:
    """Why the layer cannot be rotated."""
    weight, kind = layer.module.weight, type(layer.module)
    if type(weight) is not Parameter or weight.dtype not in DTYPES:
        return f"is quantised or sharded ({type(weight).__name__}); load the model in bf16 or fp32, unsharded"
    if getattr(weight, "gradselect_owner", None) is not None:
        return "is trained by an optimizer; convert before making one, or close() that one"
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
                f"{' and '.join(known)} are one tensor, and one of them cannot be rotated alone; untie them"
            )
