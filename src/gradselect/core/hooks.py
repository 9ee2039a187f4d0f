"""Hooks that do not keep a discarded optimizer alive, and do nothing in copies of its model."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle


def weak_hook(method: Callable[..., None], *arguments: object) -> Callable[[Tensor], None]:
    """Return a hook that calls `method(*arguments, parameter)` while the object of the method is alive.

    Args:
        method: a bound method. The hook holds its object by a weak reference.
        arguments: passed before the parameter.

    Example:
        >>> import torch
        >>> class Counter:
        ...     count = 0
        ...     def arrived(self, name, parameter):
        ...         self.count += 1
        >>> counter, weight = Counter(), torch.nn.Parameter(torch.ones(1))
        >>> handle = weight.register_post_accumulate_grad_hook(weak_hook(counter.arrived, "weight"))
        >>> weight.sum().backward()
        >>> counter.count
        1
    """
    reference = weakref.WeakMethod(method)

    def hook(parameter: Tensor) -> None:
        alive = reference()
        if alive is not None:
            assert isinstance(parameter, Parameter)
            alive(*arguments, parameter)

    return hook


def remove_all(handles: list[RemovableHandle]) -> None:
    """Remove all hooks, and forget their handles."""
    while handles:
        handles.pop().remove()


def remove_with(owner: object, handles: list[RemovableHandle]) -> None:
    """Remove the hooks that are in the list by then when their owner goes."""
    weakref.finalize(owner, remove_all, handles).atexit = False


def no_hook(*_: object) -> None:
    """Do nothing. Hooks on modules become this where a model is copied or saved whole: it belongs to no optimizer."""


def make_no_hook() -> Callable[..., None]:
    """Return `no_hook`, for the `__reduce__` of a hook."""
    return no_hook
