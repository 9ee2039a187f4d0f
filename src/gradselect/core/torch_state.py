"""State of a torch optimizer for one weight, as plain tensors: its layout, and the way there and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from gradselect.usage import UsageError

NUMBERS: Mapping[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}
"""Dtypes of the tensors that stand for plain numbers."""

RESERVED = ("master", "num_updates")
"""Names of state that the library uses itself."""


@dataclass(frozen=True)
class Part:
    """A tensor of the state, or a number.

    Attributes:
        like: on the meta device; shape, strides and dtype.
        is_number: True if the optimizer keeps a plain number.
        is_on_host: True for numbers, and for tensors that the optimizer keeps on the CPU: step counters.
    """

    like: Tensor
    is_number: bool
    is_on_host: bool


@dataclass(frozen=True)
class Wrapper:
    """Tensor of a class of its own, such as torchao's quantised moments, which wraps plain tensors.

    Attributes:
        kind: the class.
        inner: names of the tensors in it.
        context: as its `__tensor_flatten__` returns it.
        like: on the meta device; shape and strides of the whole.
    """

    kind: Any
    inner: tuple[str, ...]
    context: Any
    like: Tensor


@dataclass(frozen=True)
class Layout:
    """Layout of the state of one weight after its first update.

    Attributes:
        parts: plain tensors and numbers, by name; those inside a wrapper have its name before their own.
        wrappers: by name.
        nothing: names under which the optimizer keeps None.
    """

    parts: Mapping[str, Part]
    wrappers: Mapping[str, Wrapper]
    nothing: tuple[str, ...]

    def restore(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the state as the optimizer keeps it; tensors are shared."""
        plain = {name: value.item() if self.parts[name].is_number else value for name, value in state.items()}
        restored: dict[str, Any] = {name: value for name, value in plain.items() if "." not in name}
        for name, wrapper in self.wrappers.items():
            inner = {each: plain[f"{name}.{each}"] for each in wrapper.inner}
            shape, stride = wrapper.like.shape, wrapper.like.stride()
            restored[name] = wrapper.kind.__tensor_unflatten__(inner, wrapper.context, shape, stride)
        return {**restored, **dict.fromkeys(self.nothing)}


def layout_of(state: Mapping[str, Any], *, weight: Tensor) -> Layout:
    """Return the layout of a state that an optimizer made for `weight`.

    Raises:
        UsageError: it holds something else than tensors and numbers, or uses a reserved name.
    """
    parts: dict[str, Part] = {}
    wrappers: dict[str, Wrapper] = {}
    nothing = []
    for name, value in state.items():
        if name in RESERVED or "." in str(name) or not isinstance(name, str):
            raise UsageError(f"it keeps a state named {name!r}, a name that this library uses itself")
        if value is None:
            nothing.append(name)
        elif type(value) in NUMBERS:
            parts[name] = Part(torch.empty((), dtype=NUMBERS[type(value)], device="meta"), True, True)
        elif isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
            inner, context = value.__tensor_flatten__()
            whole = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            wrappers[name] = Wrapper(type(value), tuple(inner), context, whole)
            for each in inner:
                parts[f"{name}.{each}"] = _part(getattr(value, each), weight)
        elif isinstance(value, Tensor):
            parts[name] = _part(value, weight)
        else:
            raise UsageError(f"it keeps a {type(value).__name__} as state {name!r}, and state is tensors and numbers")
    return Layout(parts, wrappers, tuple(nothing))


def _part(value: Tensor, weight: Tensor) -> Part:
    return Part(torch.empty_like(value, device="meta"), False, value.device.type == "cpu" != weight.device.type)


def flat(state: Mapping[str, Any], layout: Layout) -> Iterator[tuple[str, Any]]:
    """Yield the plain tensors and numbers of an optimizer's state under the names of the layout.

    Raises:
        UsageError: they are not those of the layout.
    """
    found = set()
    for name, value in state.items():
        if value is None and name in layout.nothing:
            continue
        inner = layout.wrappers[name].inner if name in layout.wrappers else None
        for key, each in [(name, value)] if inner is None else [(f"{name}.{k}", getattr(value, k)) for k in inner]:
            if key not in layout.parts or isinstance(each, Tensor) == layout.parts[key].is_number:
                raise UsageError(f"it changed the kind of its state {key!r} after the first update")
            found.add(key)
            yield key, each
    if found != set(layout.parts):
        raise UsageError(f"it dropped its state {sorted(set(layout.parts) - found)} after the first update")


def probe(build: Callable[[Tensor], Optimizer], weight: Tensor) -> Layout:
    """Return the layout for a weight: the optimizer takes a step on the meta device, without memory or arithmetic."""
    stand_in = torch.empty_like(weight, device="meta").detach()
    stand_in.grad = torch.empty_like(stand_in)
    with aside(), _AnyNumber():
        optimizer = build(stand_in)
        optimizer.step()
    return layout_of(optimizer.state[stand_in], weight=stand_in)


@contextmanager
def aside() -> Iterator[None]:
    """Run an optimizer for a look at it: no gradients, nothing compiled, the global random state untouched."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        # Importing dynamo takes seconds; a class that compiles its step has imported it.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _AnyNumber(TorchDispatchMode):
    """Reads 1.0 from every tensor on the meta device, so that code which needs a value goes on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        return func(*args, **(kwargs or {}))
