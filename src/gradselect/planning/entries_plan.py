"""The step of `SparseOptimizer`, and that of an optimizer that trains all it is given, before there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gradselect.blocks import partition, visited_share
from gradselect.core import HALF
from gradselect.entries import (
    RUN,
    AbstractDenseMask,
    AbstractMask,
    MaskTensor,
    index_dtype,
    matching,
    resolve_budget,
    share_out,
)
from gradselect.masks import GMT, ID3, LIFT, BitFit, StaticMask, TopGradient
from gradselect.usage import UsageError

from .bytes import Bytes, cost
from .forward_pass import ForwardPass
from .steps import Gradients, Step, Work, moments

INDEX_AND_VALUE = 20
"""Bytes of an entry while the best ones are sought: score, gradient, index, rank."""


@dataclass(frozen=True, kw_only=True)
class MaskTraining:
    """What decides the bytes of a run with a mask; fields are the arguments of `SparseOptimizer`.

    Args:
        always: names or globs of parameters that train whole.
        num_steps: of the run; each may add a byte of bookkeeping for eight steps and tensor.
    """

    model: nn.Module
    mask: AbstractMask
    always: Sequence[str]
    master_dtype: torch.dtype | None
    accumulation_steps: int = 1
    num_steps: int = 1000


def mask_step(training: MaskTraining, forward: ForwardPass) -> Step:
    """The one kind of step that a mask has, when its set is full.

    Raises:
        UsageError: the mask does not fit the model, or is of a kind whose entries nobody can foresee.
    """
    named = {name: parameter for name, parameter in training.model.named_parameters() if parameter.requires_grad}
    tensors = [
        MaskTensor(name=name, parameter=parameter, module=training.model.get_submodule(name.rpartition(".")[0]))
        for name, parameter in named.items()
    ]
    always = [tensor.name for tensor in matching(tensors, training.always)] if training.always else []
    mask = training.mask.bind([tensor for tensor in tensors if tensor.name not in always])
    is_dense = isinstance(mask, AbstractDenseMask)
    whole = [named[name] for name in (*always, *(mask.names if is_dense else ()))]
    dense = cost(whole, master_dtype=training.master_dtype)
    entries = {} if is_dense else entry_counts(mask)
    held, in_use = _entry_bytes(mask, entries, training)
    held += Bytes(
        weights=sum(parameter.nbytes for parameter in training.model.parameters()),
        masters=dense.masters,
        state_on_device=dense.moments,
    )
    trained = [*mask.names, *always]
    window = sum(named[name].nbytes for name in trained)
    largest_gradient = max(named[name].nbytes for name in trained)
    gradients = Gradients(
        before=window if training.accumulation_steps > 1 else 0,
        most=window if training.accumulation_steps > 1 else dense.gradients + in_use + largest_gradient,
        after=dense.gradients + in_use,
    )
    work = work_of(training.model, trained, forward)
    return Step(
        kind="step",
        moments=moments(held, forward.kept(trained), gradients, workspace=_workspace(entries, dense.largest)),
        relative_time=work.relative_time,
        backward_skipped=work.backward_skipped,
    )


def whole_step(model: nn.Module, forward: ForwardPass, *, accumulation_steps: int) -> Step:
    """A step of torch's fused AdamW on all that requires a gradient."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    part = cost(trained.values(), master_dtype=None)
    held = Bytes(weights=sum(parameter.nbytes for parameter in model.parameters()), state_on_device=part.moments)
    before = part.gradients if accumulation_steps > 1 else 0
    gradients = Gradients(before=before, most=part.gradients, after=part.gradients)
    work = work_of(model, list(trained), forward)
    return Step(
        kind="step",
        moments=moments(held, forward.kept(list(trained)), gradients, workspace=0),
        relative_time=work.relative_time,
        backward_skipped=work.backward_skipped,
    )


def work_of(model: nn.Module, trained: Sequence[str], forward: ForwardPass) -> Work:
    """What a step computes in which these parameters have gradients, and the same ones always."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    adapters = sum(size for name, size in sizes.items() if ".lora_" in name)
    blocks = partition_all(model)
    names = set(trained)
    touched = [block for block, members in blocks.items() if not names.isdisjoint(members)]
    total = sum(sizes.values())
    return Work(
        depth=visited_share(touched, list(blocks)),
        frozen=1 - sum(sizes[name] for name in trained) / total,
        growth=total / (total - adapters),
        checkpointing=forward.checkpointing,
    )


def partition_all(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Names of the parameters of each block, frozen ones among them, in model order."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(True)
        return {block.name: block.parameter_names for block in partition(model)}
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def entry_counts(mask: AbstractMask) -> dict[tuple[MaskTensor, ...], int]:
    """How many entries each group of tensors has that shares a budget.

    Raises:
        UsageError: a mask that is not of this package.
    """
    match mask:
        case ID3():
            return {mask.tensors: mask.num_unmasked(mask.steps - 1)}
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
        case GMT():
            return {}
        case _:
            raise UsageError(
                f"nobody can foresee how many entries {type(mask).__name__} chooses; "
                "plan with gs.StaticMask(budget=...) of as many"
            )


def _lift_count(mask: LIFT, tensor: MaskTensor) -> int:
    if mask.rank is None:
        assert mask.density is not None
        return max(1, round(mask.density * tensor.numel))
    return min(mask.rank * sum(tensor.parameter.shape), tensor.numel)


def _entry_bytes(
    mask: AbstractMask, entries: dict[tuple[MaskTensor, ...], int], training: MaskTraining
) -> tuple[Bytes, int]:
    """Indices, moments and masters of the entries, and their gradients from the backward pass to the update."""
    held, gradients = Bytes(), 0
    for tensors, count in entries.items():
        # Of a budget that several tensors share, by the first: they are nearly always alike.
        dtype = tensors[0].parameter.dtype
        has_master = training.master_dtype is not None and dtype in HALF
        moment = torch.promote_types(dtype, torch.float32).itemsize
        index = index_dtype(max(tensor.numel for tensor in tensors)).itemsize
        held += Bytes(masters=count * moment if has_master else 0, state_on_device=count * (2 * moment + index))
        gradients += count * moment
    held += Bytes(state_on_device=len(mask.tensors) * _cohort_bytes(mask, training.num_steps) if entries else 0)
    return held, gradients


def _cohort_bytes(mask: AbstractMask, num_steps: int) -> int:
    """One bit for each step at which entries of a tensor may join, in whole bytes."""
    match mask:
        case ID3():
            joins_last = mask.steps
        case TopGradient():
            joins_last = num_steps
        case StaticMask() | LIFT() if mask.refresh_every is not None:
            joins_last = (num_steps - 1) // mask.refresh_every * mask.refresh_every + 1
        case _:
            joins_last = 1
    return -(-min(joins_last, num_steps) // 8)


def _workspace(entries: dict[tuple[MaskTensor, ...], int], largest: int) -> int:
    """Of one run of entries: weights, step sizes, roots and the denominator; or of a whole tensor's denominator."""
    count = sum(entries.values())
    return max(count * INDEX_AND_VALUE, 4 * 4 * min(count, RUN), 2 * 4 * largest)
