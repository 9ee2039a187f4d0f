"""Checks of what a SparseOptimizer is built from."""

from __future__ import annotations

from torch import nn

from gradselect.core import AbstractRule, is_frozen_for_now
from gradselect.parallel import check_placement, local_part, unwrapped
from gradselect.usage import UsageError

from .mask import AbstractDenseMask, AbstractMask, MaskTensor


def check_model(model: nn.Module) -> nn.Module:
    """Return the model without its wrappers.

    Raises:
        UsageError: it is spread over devices in a way that hides its gradients.
    """
    check_placement(model)
    return unwrapped(model)


def check_rule(rule: AbstractRule, mask: AbstractMask) -> None:
    """Refuse a rule that does not work on single entries, unless the mask has state for every weight.

    Raises:
        UsageError: names the rule.
    """
    if not rule.works_on_entries and not isinstance(mask, AbstractDenseMask):
        raise UsageError(
            f"{type(rule).__name__} keeps numbers that neighbouring weights share, and selected entries have no "
            "neighbours; write rule=gs.AdamWRule()"
        )


def check_norm(max_grad_norm: float | None) -> None:
    """Refuse a limit that is not above 0.

    Raises:
        UsageError: names the value.
    """
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise UsageError(
            f"max_grad_norm={max_grad_norm} must be above 0; write max_grad_norm=1.0, or None for no limit"
        )


def trainable_tensors(model: nn.Module) -> list[MaskTensor]:
    """Return every tensor that trains, in model order, tied ones once.

    Raises:
        UsageError: there is none, or one does not lie in memory as a flat array.
    """
    tensors = [
        MaskTensor(name=name, parameter=parameter, module=model.get_submodule(name.rpartition(".")[0]))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or is_frozen_for_now(parameter)
    ]
    if not tensors:
        raise UsageError(f"no parameter of {type(model).__name__} requires a gradient; call model.requires_grad_(True)")
    for tensor in tensors:
        if not local_part(tensor.parameter).is_contiguous():
            raise UsageError(
                f"{tensor.name} is not contiguous in memory; write parameter.data = parameter.contiguous()"
            )
    return tensors
