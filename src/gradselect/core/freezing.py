"""Freezing of parameters by an optimizer, marked to tell it from the user's own, and undone when the optimizer goes."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from gradselect.usage import UsageError

_NUMBERS = itertools.count(1)


def freeze(parameter: Parameter, frozen: bool) -> None:
    """Freeze or thaw a parameter, and drop its gradient if that changes it.

    A frozen parameter carries the mark `gradselect_frozen`, so that a partition still counts it as trainable.
    """
    if parameter.requires_grad == frozen:
        parameter.requires_grad_(not frozen)
        parameter.grad = None
    if frozen:
        parameter.gradselect_frozen = True  # pyright: ignore[reportAttributeAccessIssue]
    elif is_frozen_for_now(parameter):
        del parameter.gradselect_frozen  # pyright: ignore[reportAttributeAccessIssue]


def is_frozen_for_now(parameter: Parameter) -> bool:
    """True if an optimizer of this package froze the parameter, not the user."""
    return getattr(parameter, "gradselect_frozen", False)


class Ownership:
    """Marks parameters with their newest optimizer, so that hooks of an older one do nothing.

    When the optimizer is dropped or closed, its parameters become trainable again and lose the mark.

    Args:
        optimizer: held by a weak reference.
        parameters: get the mark `gradselect_owner`, the number of this owner.
    """

    def __init__(self, optimizer: object, parameters: Sequence[Parameter]) -> None:
        self._number = next(_NUMBERS)
        self._optimizer = weakref.ref(optimizer)
        self._finalizer: weakref.finalize[..., Any] | None = None
        self.take(parameters)

    def take(self, parameters: Sequence[Parameter]) -> None:
        """Own these parameters instead of earlier ones that a wrapper has replaced."""
        if self._finalizer is not None:
            self._finalizer.detach()
        for parameter in parameters:
            parameter.gradselect_owner = self._number  # pyright: ignore[reportAttributeAccessIssue]
        self._finalizer = weakref.finalize(self._optimizer(), _give_back, list(parameters), self._number)
        self._finalizer.atexit = False

    def covers(self, parameter: Tensor) -> bool:
        """True if no newer optimizer of this package was built on the same model."""
        return getattr(parameter, "gradselect_owner", None) == self._number

    def check(self, parameters: Iterable[Parameter]) -> None:
        """Refuse a step of an optimizer that no longer owns its parameters.

        Raises:
            UsageError: a newer one was built, or this one was closed.
        """
        if not all(map(self.covers, parameters)):
            raise UsageError("a newer optimizer was built on this model, or this one was closed; step that one")

    def release(self) -> None:
        """Make the parameters trainable again and remove the marks."""
        if self._finalizer is not None:
            self._finalizer()


def _give_back(parameters: Sequence[Parameter], owner: int) -> None:
    """Thaw and unmark the parameters of `owner`, but not those that a newer optimizer has taken."""
    for parameter in parameters:
        if getattr(parameter, "gradselect_owner", None) == owner:
            del parameter.gradselect_owner  # pyright: ignore[reportAttributeAccessIssue]
            if is_frozen_for_now(parameter):
                freeze(parameter, False)
