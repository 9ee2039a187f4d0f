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

_OWNER, _FROZEN, _KEPT_FROZEN = "gradselect_owner", "gradselect_frozen", "gradselect_kept_frozen"
_COPIES = ("__deepcopy__", "__reduce_ex__")
_MARKS = (_OWNER, _FROZEN, _KEPT_FROZEN, *_COPIES)


def freeze(parameter: Parameter, frozen: bool) -> None:
    """Freeze or thaw a parameter, and drop its gradient if that changes it.

    A frozen parameter carries the mark `gradselect_frozen`, so that a partition still counts it as trainable. What the
    user froze while its optimizer was closed stays frozen.
    """
    if is_kept_frozen(parameter):
        return
    if parameter.requires_grad == frozen:
        parameter.requires_grad_(not frozen)
        parameter.grad = None
    if frozen:
        parameter.gradselect_frozen = True  # pyright: ignore[reportAttributeAccessIssue]
    elif is_frozen_for_now(parameter):
        del parameter.gradselect_frozen  # pyright: ignore[reportAttributeAccessIssue]


def is_frozen_for_now(parameter: Tensor) -> bool:
    """True if an optimizer of this package froze the parameter, not the user."""
    return _FROZEN in vars(parameter)


def is_kept_frozen(parameter: Tensor) -> bool:
    """True if the user froze the parameter while its optimizer was closed."""
    return _KEPT_FROZEN in vars(parameter)


def settle(parameters: Iterable[Parameter]) -> None:
    """Read what the user froze, on top of an optimizer that is alive and has frozen parameters for the moment.

    The optimizer leaves its selection trainable. If all of that is frozen now, somebody froze the whole model, as an
    adapter does: then everything counts as frozen by the user. If a part of it is, nobody can tell which of the other
    frozen parameters the user means.

    Raises:
        UsageError: in the second case.
    """
    owned = [parameter for parameter in parameters if _OWNER in vars(parameter)]
    left = [parameter for parameter in owned if not is_frozen_for_now(parameter)]
    changed = [parameter for parameter in left if not parameter.requires_grad and not is_kept_frozen(parameter)]
    if not changed:
        return
    if any(parameter.requires_grad for parameter in left):
        raise UsageError(
            f"{len(changed)} parameters of the model were frozen while an optimizer of gradselect held it, which "
            "freezes others for the moment: nobody can tell yours from its own; call close() on that optimizer, then "
            "freeze, then build the new one"
        )
    for parameter in owned:
        _unmark(parameter)


class Ownership:
    """Marks parameters with their newest optimizer, so that hooks of an older one do nothing.

    When the optimizer is dropped or closed, its parameters become trainable again and lose the mark. A copy of an owned
    parameter (`deepcopy`, pickle) is trainable if its user left it so, and has no mark.

    Args:
        optimizer: held by a weak reference.
        parameters: get the mark `gradselect_owner`, the number of this owner.
    """

    def __init__(self, optimizer: object, parameters: Sequence[Parameter]) -> None:
        self._number = next(_NUMBERS)
        self._optimizer = weakref.ref(optimizer)
        self._finalizer: weakref.finalize[..., Any] | None = None
        self.take(parameters)

    @property
    def optimizer(self) -> object | None:
        """The optimizer, while it lives."""
        return self._optimizer()

    @property
    def is_held(self) -> bool:
        """True until `release`."""
        return self._finalizer is not None and self._finalizer.alive

    def take(self, parameters: Sequence[Parameter]) -> None:
        """Own these parameters instead of earlier ones that a wrapper has replaced."""
        if self._finalizer is not None:
            self._finalizer.detach()
        for parameter in parameters:
            parameter.gradselect_owner = self._number  # pyright: ignore[reportAttributeAccessIssue]
            for name, copy in zip(_COPIES, (_DeepCopy(parameter), _Reduce(parameter)), strict=True):
                vars(parameter)[name] = copy
        self._finalizer = weakref.finalize(self._optimizer(), _give_back, list(parameters), self._number)
        self._finalizer.atexit = False

    def retake(self, parameters: Sequence[Parameter]) -> None:
        """Own parameters again after `release`; those that are frozen now stay so, because the user froze them."""
        self._number = next(_NUMBERS)
        self.take(parameters)
        for parameter in parameters:
            if not parameter.requires_grad and not is_frozen_for_now(parameter):
                parameter.gradselect_kept_frozen = True  # pyright: ignore[reportAttributeAccessIssue]

    def covers(self, parameter: Tensor) -> bool:
        """True if no newer optimizer of this package was built on the same model."""
        return getattr(parameter, _OWNER, None) == self._number

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


class _DeepCopy:
    """Deep copy of a parameter as its user had it. Holds the parameter weakly: it stands in its own attributes."""

    def __init__(self, parameter: Parameter) -> None:
        self._parameter = weakref.ref(parameter)

    def __call__(self, memo: dict[int, Any]) -> Any:
        parameter = self._parameter()
        assert parameter is not None
        copied = type(parameter).__deepcopy__(parameter, memo)
        return copied.requires_grad_(copied.requires_grad or is_frozen_for_now(parameter))


class _Reduce:
    """Pickled form of a parameter as its user had it."""

    def __init__(self, parameter: Parameter) -> None:
        self._parameter = weakref.ref(parameter)

    def __call__(self, protocol: int) -> Any:
        parameter = self._parameter()
        assert parameter is not None
        marks = {name: vars(parameter).pop(name) for name in _MARKS if name in vars(parameter)}
        is_trainable = parameter.requires_grad
        try:
            parameter.requires_grad_(is_trainable or _FROZEN in marks)
            return type(parameter).__reduce_ex__(parameter, protocol)
        finally:
            parameter.requires_grad_(is_trainable)
            vars(parameter).update(marks)


def _give_back(parameters: Sequence[Parameter], owner: int) -> None:
    """Thaw and unmark the parameters of `owner`, but not those that a newer optimizer has taken."""
    for parameter in parameters:
        if getattr(parameter, _OWNER, None) == owner:
            if is_frozen_for_now(parameter):
                freeze(parameter, False)
            _unmark(parameter)


def _unmark(parameter: Parameter) -> None:
    for name in _MARKS:
        vars(parameter).pop(name, None)
