"""Checks of the arguments of a SparseOptimizer."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.core import (
    ADVICE,
    AbstractRule,
    Block,
    can_train,
    check_shards,
    is_chosen,
    is_frozen_for_now,
    nothing_trains,
    quantised_weights,
    settle,
)
from gradselect.parallel import check_placement, local_part, shard_groups, unwrapped
from gradselect.slices import check_whole_layers
from gradselect.usage import UsageError, check_is, check_whole, is_number

from .mask import AbstractDenseMask, AbstractMask, MaskTensor, check_trains

logger = logging.getLogger(__name__)


def check_model(model: nn.Module, rule: AbstractRule) -> nn.Module:
    """Return the model without its wrappers.

    Raises:
        UsageError: a wrapper hides its gradients, its parameters are on several devices, or it is sliced.
    """
    check_placement(model)
    inner = unwrapped(model)
    check_whole_layers(inner, to="a mask")
    check_shards(inner.parameters(), rule)
    return inner


def check_arguments(
    mask: AbstractMask, rule: AbstractRule, *, max_grad_norm: float | None, accumulation_steps: int
) -> None:
    """Check the arguments that need no model.

    Raises:
        UsageError: there is no mask, the rule does not work on entries, or a number is outside its range.
    """
    check_is(mask, AbstractMask, name="mask", example="mask=gs.ID3(density=0.01, steps=1000)")
    check_whole("accumulation_steps", accumulation_steps)
    # A dense mask has state for every entry.
    if not rule.works_on_entries and not isinstance(mask, AbstractDenseMask):
        raise UsageError(
            f"{rule.name} {rule.why_whole_tensors}, and {type(mask).__name__} selects entries of them; "
            "write rule=gs.AdamWRule()"
        )
    if isinstance(mask, AbstractDenseMask) and mask.ranks == "momentum" and rule.momentum_name is None:
        raise UsageError(
            f"{type(mask).__name__} ranks entries by their momentum, and {rule.name} keeps none in full precision; "
            "write rule=gs.AdamWRule() or rule=gs.SGDRule(momentum=0.9)"
        )
    if isinstance(mask, AbstractDenseMask) and mask.mask == "gradient":
        _ = rule.decouples_decay  # some rules cannot say, and then refuse
    if max_grad_norm is not None and (not is_number(max_grad_norm) or not max_grad_norm > 0):
        raise UsageError(
            f"max_grad_norm={max_grad_norm!r} must be above 0; write max_grad_norm=1.0, or None for no limit"
        )


def check_lean(lean: bool, late: Collection[str]) -> None:
    """Refuse lean accumulation where gradients are averaged after the backward pass.

    Args:
        lean: as given.
        late: names of parameters whose gradients are averaged late.

    Raises:
        UsageError: `lean` is set, and there are such parameters.
    """
    if lean and late:
        raise UsageError(
            "lean_accumulation=True needs fully_shard or replicate, which average each gradient in the backward pass; "
            "leave it out: under DistributedDataParallel gradients stay until step()"
        )


def check_not_replaced(groups: Iterable[tuple[str, Parameter]], read: Mapping[str, Parameter]) -> None:
    """Refuse parameters that were put into the optimizer's groups after it was built.

    Args:
        groups: named parameters of the optimizer's groups.
        read: parameters whose gradients are read.

    Raises:
        UsageError: names the first that differs.
    """
    for name, parameter in groups:
        if parameter is not read[name]:
            raise UsageError(
                f"another tensor was put into the optimizer's groups for {name!r}, as Accelerate does when it "
                "shards; shard first, with fully_shard(model), then build SparseOptimizer(model, ...)"
            )


def marks_of_replicas(entries: Mapping[str, Tensor], parameters: Mapping[str, Parameter]) -> dict[str, list[int]]:
    """Sum and sum of squares of the indices of each tensor that every rank holds whole: equal on all ranks."""
    return {
        name: [int(indices.sum()), int(indices.square().sum())]
        for name, indices in entries.items()
        if not shard_groups(parameters[name])
    }


def bind_mask(
    mask: AbstractMask, tensors: Sequence[MaskTensor], model: nn.Module, *, always: Collection[str]
) -> AbstractMask:
    """Return a copy of the mask that selects among the tensors. Says what a quantised model leaves to select from.

    Args:
        mask: not bound yet.
        tensors: all that can train.
        model: that holds them.
        always: names of those that train whole beside the mask.

    Raises:
        UsageError: its settings do not fit the tensors.
    """
    tensors = [tensor for tensor in tensors if tensor.name not in always]
    fixed = quantised_weights(model)
    num_fixed = 0 if not fixed or is_chosen(model, "", fixed) else sum(fixed.values())
    try:
        bound = mask.bind(tensors)
    except UsageError as error:
        if not num_fixed:
            raise
        raise UsageError(
            f"{error} ({num_fixed:,} weights are quantised or integers and cannot train; {ADVICE})"
        ) from None
    check_trains(bound, always)
    if num_fixed:
        num_usable = sum(tensor.numel for tensor in bound.tensors)
        logger.warning(
            "quantised or integer weights cannot train: %s selects among %.1f %% of the weights (%s of %s, in %d "
            "tensors); %s",
            type(mask).__name__,
            100 * num_usable / (num_usable + num_fixed),
            f"{num_usable:,}",
            f"{num_usable + num_fixed:,}",
            len(bound.tensors),
            ADVICE,
        )
    return bound


def blocks_of(tensors: Sequence[MaskTensor], names: Collection[str]) -> list[Block]:
    """Return the tensors of these names as blocks of one parameter each."""
    return [
        Block(name=tensor.name, parameters=(tensor.parameter,), parameter_names=(tensor.name,))
        for tensor in tensors
        if tensor.name in names
    ]


def trainable_tensors(model: nn.Module) -> list[MaskTensor]:
    """Return all trainable tensors, in model order, tied ones once.

    Raises:
        UsageError: there is none, or one is not contiguous in memory.
    """
    settle(model.parameters())
    tensors = [
        MaskTensor(name=name, parameter=parameter, module=model.get_submodule(name.rpartition(".")[0]))
        for name, parameter in model.named_parameters()
        if can_train(parameter) and (parameter.requires_grad or is_frozen_for_now(parameter))
    ]
    if not tensors:
        raise UsageError(nothing_trains(model))
    for tensor in tensors:
        if not local_part(tensor.parameter).is_contiguous():
            raise UsageError(
                f"{tensor.name} is not contiguous in memory; write parameter.data = parameter.contiguous()"
            )
    return tensors
