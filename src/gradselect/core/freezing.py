"""Freezing parameters for the moment, so that it can be told from the user's own freezing and undone."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn import Parameter


def freeze(parameter: Parameter, frozen: bool) -> None:
    """Freeze or thaw a parameter; when that changes it, its gradient goes.

    A frozen one is marked (`gradselect_frozen`): a partition of the model counts it among those that train.
    """
    if parameter.requires_grad == frozen:
        parameter.requires_grad_(not frozen)
        parameter.grad = None
    if frozen:
        parameter.gradselect_frozen = True  # pyright: ignore[reportAttributeAccessIssue]
    elif is_frozen_for_now(parameter):
        del parameter.gradselect_frozen  # pyright: ignore[reportAttributeAccessIssue]


def is_frozen_for_now(parameter: Parameter) -> bool:
    """Whether an optimizer of this package, and not the user, has frozen the parameter."""
    return getattr(parameter, "gradselect_frozen", False)


def give_back(parameters: Sequence[Parameter], *, owner: int) -> None:
    """Thaw what the observer `owner` holds and forget it; what a newer one holds is left alone."""
    for parameter in parameters:
        if getattr(parameter, "gradselect_owner", None) == owner:
            del parameter.gradselect_owner  # pyright: ignore[reportAttributeAccessIssue]
            if is_frozen_for_now(parameter):
                freeze(parameter, False)
