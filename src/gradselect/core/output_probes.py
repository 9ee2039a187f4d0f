"""Probes on outputs of modules: find what the loss reaches without the gradient of a single weight."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .hooks import make_no_hook

WHOLE = "the whole model"
"""Name under which the probe of the model itself is heard."""

Arrived = Callable[[Tensor], None]


class Listener(Protocol):
    """Hears of the modules that a backward pass reaches."""

    def is_listening(self) -> bool:
        """Return False if the probes should do nothing now."""
        ...

    def reached(self, name: str) -> None:
        """Hear that a gradient of an output of the module of this name has arrived."""
        ...


class OutputProbes:
    """Tells a listener when a backward pass reaches the output of a module; outputs keep their values.

    An output that requires no gradient is replaced by a copy that does, so that a loss over it can be differentiated
    although everything below is frozen. No weight gets a gradient from that, and no input of a linear layer is kept for
    one. Nothing happens in a forward pass without gradients, while torch.compile traces, and in copies of the model.

    Args:
        modules: by the name that the listener hears.
        listener: held by a weak reference.
        whole: a model: every tensor of its output that requires no gradient gets a probe, under the name `WHOLE`.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        listener: Listener,
        *,
        whole: nn.Module | None = None,
    ) -> None:
        self._whole = _Probe(WHOLE, listener, _probe_all)
        self._handles = {
            name: module.register_forward_hook(_Probe(name, listener, _probe_first)) for name, module in modules.items()
        }
        if whole is not None:
            self._handles[WHOLE] = whole.register_forward_hook(self._whole)
        weakref.finalize(self, _remove, self._handles).atexit = False

    def keep(self, name: str | None) -> None:
        """Remove all probes but that of one module, and that of the whole model for outputs without any gradient."""
        self._whole.probe = _probe_if_none
        for other in [*self._handles]:
            if other not in (name, WHOLE):
                self._handles.pop(other).remove()

    def remove(self) -> None:
        """Remove all probes."""
        _remove(self._handles)


class _Probe:
    """Forward hook of one module."""

    def __init__(self, name: str, listener: Listener, probe: Callable[[Any, Arrived], Any]) -> None:
        self._name = name
        self._listener = weakref.ref(listener)
        self.probe = probe

    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        listener = self._listener()
        if listener is None or not listener.is_listening():
            return None
        return self.probe(output, self._arrived)

    def _arrived(self, gradient: Tensor) -> None:
        listener = self._listener()
        if listener is not None:
            listener.reached(self._name)

    def __reduce__(self) -> Any:
        return make_no_hook, ()


def _remove(handles: dict[str, RemovableHandle]) -> None:
    while handles:
        handles.popitem()[1].remove()


def _probe_first(output: Any, arrived: Arrived) -> Any:
    """Put a probe on the output, or on the tensors of a tuple or list; other outputs have none."""
    if isinstance(output, Tensor):
        return _probed(output, arrived)
    if type(output) in (tuple, list):
        return type(output)(_probed(each, arrived) if isinstance(each, Tensor) else each for each in output)
    return None


def _probe_all(output: Any, arrived: Arrived) -> Any:
    """Put a probe on each tensor that requires no gradient, also in mappings and dataclasses, which change in place."""
    items = _items(output)
    if items is None:
        return _probe_first(output, arrived)
    for name, value in items:
        if not isinstance(value, Tensor) or value.requires_grad:
            continue
        if isinstance(output, Mapping):
            output[name] = _probed(value, arrived)  # pyright: ignore[reportIndexIssue]
        else:
            object.__setattr__(output, name, _probed(value, arrived))
    return None


def _probe_if_none(output: Any, arrived: Arrived) -> Any:
    """As `_probe_all`, but only if no tensor of the output requires a gradient."""
    values = [value for _, value in _items(output) or ()] or (output if isinstance(output, tuple | list) else [output])
    if any(isinstance(value, Tensor) and value.requires_grad for value in values):
        return None
    return _probe_all(output, arrived)


def _items(output: Any) -> list[tuple[str, Any]] | None:
    """Names and values of a mapping or dataclass; None for others."""
    if isinstance(output, Mapping):
        return list(output.items())
    if dataclasses.is_dataclass(output):
        return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    return None


def _probed(output: Tensor, arrived: Arrived) -> Tensor:
    if not (output.is_floating_point() or output.is_complex()):
        return output
    if not output.requires_grad:
        token = torch.empty(0, device=output.device, requires_grad=True)
        output = _Differentiable.apply(output, token)  # pyright: ignore[reportAssignmentType]
    output.register_hook(arrived)
    return output


class _Differentiable(torch.autograd.Function):
    """Copies a tensor that requires no gradient into one that does. It is no leaf, so in-place changes are allowed."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, token: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None
