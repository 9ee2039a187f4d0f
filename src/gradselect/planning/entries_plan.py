"""Steps of a `SparseOptimizer`, and of torch's AdamW on all trainable parameters, planned without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from gradselect.blocks import StepCost
from gradselect.core import HALF, index_dtype, num_bytes
from gradselect.entries import (
    RUN,
    AbstractDenseMask,
    AbstractMask,
    MaskTensor,
    check_trains,
    matching_tensors,
    resolve_budget,
    share_out,
)
from gradselect.masks import (
    GMT,
    ID3,
    LIFT,
    BitFit,
    FixedEntries,
    MoFO,
    SpaRTA,
    StaticMask,
    TopGradient,
    salience,
)
from gradselect.usage import UsageError

from .bytes import Bytes, cost_of
from .forward_pass import ForwardPass
from .meta_forward import Rows
from .steps import Gradients, Step, Work, make_step
from .training import Training

INDEX_AND_VALUE = 20
"""Bytes of an entry during the top-k: score, gradient, index, rank."""

HESSIAN_PRODUCT = 3
"""Operations of a Hessian product, in those of a gradient: its forward pass, the backward pass, and that of both."""

Budgets = Mapping[tuple[MaskTensor, ...], int]
"""Number of entries by the tensors that share them."""


def mask_step(training: Training, mask: AbstractMask, forward: ForwardPass) -> Step:
    """Return the one kind of step of a mask, with all its entries in use.

    Raises:
        UsageError: the mask does not fit the model, or its number of entries cannot be known in advance.
    """
    named = dict(training.model.named_parameters())
    mask, always = _bind(mask, training)
    is_dense = isinstance(mask, AbstractDenseMask)
    whole = [named[name] for name in (*always, *(mask.names if is_dense else ()))]
    dense = cost_of(whole, master_dtype=training.master_dtype)
    budgets = {} if is_dense else entry_counts(mask)
    held, in_use = _entry_bytes(mask, budgets, training)
    held += Bytes(
        weights=sum(map(num_bytes, training.model.parameters())),
        masters=dense.masters,
        state_on_device=dense.moments,
    )
    trained = [*mask.names, *always]
    sizes = [num_bytes(named[name]) for name in trained]
    accumulates = training.accumulation_steps > 1
    gradients = Gradients(
        before=sum(sizes) if accumulates else 0,
        most=sum(sizes) if accumulates else dense.gradients + in_use + max(sizes),
        after=dense.gradients + in_use,
    )
    return make_step(
        "step",
        work_of(training.model, trained, forward),
        forward.kept(trained),
        held=held,
        gradients=gradients,
        workspace=_workspace(budgets, dense.largest),
    )


def looks(training: Training, mask: AbstractMask, forward: ForwardPass, *, step: Step) -> tuple[Step, ...]:
    """Return the looks of a static mask at its batches, or at an input of ones, if it runs the model for them.

    The first comes before the first step, when there is no state yet. A refresh comes at the end of a step, beside the
    state; the gradients of the step are gone.

    Args:
        training: settings.
        mask: any.
        forward: of a batch.
        step: of the mask, as `mask_step` returns it.
    """
    look = _first_look(training, mask, forward) if isinstance(mask, StaticMask) else None
    if look is None:
        return ()
    assert isinstance(mask, StaticMask)
    every = mask.refresh_every
    if every is None or every > training.num_steps:
        return (look,)
    update = step.moments["update"]
    state = Bytes(masters=update.masters, state_on_device=update.state_on_device)
    moments = {name: moment + state for name, moment in look.moments.items()}
    return (look, replace(look, kind="refresh", moments=moments, every=every))


def _first_look(training: Training, mask: StaticMask, forward: ForwardPass) -> Step | None:
    """Return the look before the first step; None if the mask does not run the model."""
    model, criterion = training.model, mask.salience
    is_flow = isinstance(criterion, salience.SynFlow)
    if not is_flow and (mask.batches is None or not criterion.has_loss):
        return None
    names = _bind(mask, training)[0].names
    magnitudes = sum(map(num_bytes, model.parameters()))
    if mask.batches is None:
        ones = forward.without_loss(Rows(batch=1, length=2))
        look = look_step(training, names, ones, num_batches=1, beside=magnitudes)
        return replace(look, relative_time=look.relative_time * ones.num_tokens / forward.num_tokens)
    num_batches = sum(1 for _ in mask.batches)
    if is_flow:
        return look_step(training, names, forward.without_loss(), num_batches=num_batches, beside=magnitudes)
    if isinstance(criterion, salience.Grasp):
        # The mean gradient, and the gradients of the batch, whose derivative is taken.
        scored = [parameter for name, parameter in model.named_parameters() if name in set(names)]
        beside = sum(_wide_bytes(each) + num_bytes(each) for each in scored)
        look = look_step(training, names, forward, num_batches=num_batches, beside=beside)
        return replace(look, relative_time=look.relative_time * (1 + HESSIAN_PRODUCT))
    return look_step(training, names, forward, num_batches=num_batches)


def look_step(
    training: Training, names: Sequence[str], forward: ForwardPass, *, num_batches: int, beside: int = 0
) -> Step:
    """Return the look at batches before the first step, by which a method scores entries of these parameters.

    In float32 or wider there are the sum over batches, if there are several, and the gradients, or scores, of one
    batch. The model runs in evaluation mode, in which transformers checkpoints nothing.

    Args:
        training: the model, and the number of such batches that a step has.
        names: of the scored parameters.
        forward: of a batch.
        num_batches: number of batches; the time is that of all.
        beside: bytes of copies that stay through the look.
    """
    forward, model = forward.without_checkpointing(), training.model
    scored = [parameter for name, parameter in model.named_parameters() if name in set(names)]
    gradients, wide = sum(map(num_bytes, scored)), sum(_wide_bytes(parameter) for parameter in scored)
    halves = sum(num_bytes(parameter) for parameter in scored if parameter.dtype in HALF)
    total = wide if num_batches > 1 else 0
    look = make_step(
        "look",
        work_of(model, names, forward),
        forward.kept(names),
        held=Bytes(weights=sum(map(num_bytes, model.parameters())), workspace=beside),
        gradients=Gradients(before=total, most=total + gradients, after=total + wide + halves),
    )
    return replace(look, relative_time=look.relative_time * num_batches / training.accumulation_steps)


def adamw_step(training: Training, forward: ForwardPass) -> Step:
    """Return the step of torch's fused AdamW on all that requires a gradient."""
    model = training.model
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    cost = cost_of(trained.values(), master_dtype=None)
    before = cost.gradients if training.accumulation_steps > 1 else 0
    return make_step(
        "step",
        work_of(model, list(trained), forward),
        forward.kept(list(trained)),
        held=Bytes(weights=sum(map(num_bytes, model.parameters())), state_on_device=cost.moments),
        gradients=Gradients(before=before, most=cost.gradients, after=cost.gradients),
    )


def work_of(model: nn.Module, trained: Sequence[str], forward: ForwardPass) -> Work:
    """Return the operations of a step in which always the same parameters have gradients."""
    cost = StepCost.of_model(model, {name: (name,) for name in trained})
    lowest = min(cost.depths.values(), default=None)
    return Work(
        cost=cost,
        backward=cost.backward(trained),
        recomputed=cost.recomputed(lowest) if forward.checkpointing else 0.0,
    )


def entry_counts(mask: AbstractMask) -> Budgets:
    """Return the number of entries of each group of tensors that shares a budget.

    Raises:
        UsageError: the mask is none of this package.
    """
    match mask:
        case ID3():
            return {mask.tensors: resolve_budget(mask.tensors, budget=mask.budget, density=mask.density)}
        case StaticMask():
            budget = resolve_budget(mask.tensors, budget=mask.budget, density=mask.density)
            if mask.scope == "global":
                return {mask.tensors: budget}
            counts = share_out(mask.tensors, budget)
            return {(tensor,): counts[tensor.name] for tensor in mask.tensors}
        case BitFit():
            return {(tensor,): tensor.numel for tensor in mask.tensors}
        case TopGradient():
            return {(tensor,): max(1, round(mask.density * tensor.numel)) for tensor in mask.tensors}
        case LIFT():
            return {(tensor,): _lift_count(mask, tensor) for tensor in mask.tensors}
        case SpaRTA():
            return {mask.tensors: mask.expected_entries}
        case FixedEntries():
            return {(tensor,): len(mask.entries[tensor.name]) for tensor in mask.tensors}
        case GMT() | MoFO():
            return {}
        case _:
            raise UsageError(
                f"the number of entries that {type(mask).__name__} selects cannot be known in advance; "
                "plan with gs.StaticMask(budget=...) of the number that you expect"
            )


def _bind(mask: AbstractMask, training: Training) -> tuple[AbstractMask, list[str]]:
    """The mask on its tensors, and the names of parameters that train whole."""
    tensors = [
        MaskTensor(name=name, parameter=parameter, module=training.model.get_submodule(name.rpartition(".")[0]))
        for name, parameter in training.model.named_parameters()
        if parameter.requires_grad
    ]
    always = [tensor.name for tensor in matching_tensors(tensors, training.always)] if training.always else []
    bound = mask.bind([tensor for tensor in tensors if tensor.name not in always])
    check_trains(bound, always)
    return bound, always


def _wide_bytes(parameter: torch.Tensor) -> int:
    return parameter.numel() * torch.promote_types(parameter.dtype, torch.float32).itemsize


def _lift_count(mask: LIFT, tensor: MaskTensor) -> int:
    if mask.rank is None:
        assert mask.density is not None
        return max(1, round(mask.density * tensor.numel))
    return min(mask.rank * sum(tensor.parameter.shape), tensor.numel)


def _entry_bytes(mask: AbstractMask, budgets: Budgets, training: Training) -> tuple[Bytes, int]:
    """Indices, moments and masters of the entries, and bytes of their gradients between backward pass and update."""
    held, gradients = Bytes(), 0
    for tensors, count in budgets.items():
        # Tensors that share a budget nearly always have the same dtype: the first decides.
        dtype = tensors[0].parameter.dtype
        has_master = training.master_dtype is not None and dtype in HALF
        moment = torch.promote_types(dtype, torch.float32).itemsize
        index = index_dtype(max(tensor.numel for tensor in tensors)).itemsize
        held += Bytes(masters=count * moment if has_master else 0, state_on_device=count * (2 * moment + index))
        gradients += count * moment
    held += Bytes(state_on_device=len(mask.tensors) * _cohort_bytes(mask, training.num_steps) if budgets else 0)
    return held, gradients


def _cohort_bytes(mask: AbstractMask, num_steps: int) -> int:
    """One bit for each step at which entries of a tensor may join, in whole bytes."""
    match mask:
        case ID3():
            joins_last = num_steps if mask.steps is None else mask.steps
        case TopGradient():
            joins_last = num_steps
        case StaticMask() | LIFT() if mask.refresh_every is not None:
            joins_last = (num_steps - 1) // mask.refresh_every * mask.refresh_every + 1
        case _:
            joins_last = 1
    return -(-min(joins_last, num_steps) // 8)


def _workspace(budgets: Budgets, largest: int) -> int:
    """The top-k, or one run of entries (weights, step sizes, roots, denominator), or a whole tensor's denominator."""
    count = sum(budgets.values())
    return max(count * INDEX_AND_VALUE, 4 * 4 * min(count, RUN), 2 * 4 * largest)
