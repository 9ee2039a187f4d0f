"""Writer and reader of a BlockOptimizer's state_dict."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradselect.core import NOT_OF_A_GROUP, AdamWRule, as_text, check_same, plain_numbers, selection_of, states_by_name
from gradselect.parallel import is_dtensor
from gradselect.usage import UsageError

if TYPE_CHECKING:
    from .optimizer import BlockOptimizer

logger = logging.getLogger(__name__)


def identity_of(optimizer: BlockOptimizer) -> dict[str, Any]:
    """Return the facts that a checkpoint must share with the run that loads it."""
    return {
        "policy": type(optimizer.policy).__name__,
        "policy_settings": optimizer.policy.settings(),
        "rule": optimizer.rule.identity,
        "blocks": {name: list(members) for name, members in optimizer._table.members.items()},
        "always": list(optimizer._always),
        "borders": optimizer._borders.identity(),
        "groups": [list(group["param_names"]) for group in optimizer.param_groups],
    }


def write_state_dict(optimizer: BlockOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Add `selection` to torch's state_dict: everything else that decides the next step.

    The first group holds `selection` too, as text, because `torch.distributed.checkpoint.state_dict` keeps only `state`
    and `param_groups`. It also loads only what both the checkpoint and the new optimizer hold, so for a sharded model
    every parameter gets a state, zeros if it has none; `selection` lists those that have one.

    Args:
        optimizer: between two steps.
        state_dict: of torch's Optimizer.

    Raises:
        UsageError: within a step, where `update_in_backward` has moved weights already.
    """
    if optimizer._pass_hooks.updates.has_moved:
        raise UsageError(
            "state_dict() between backward() and step(), but update_in_backward=True has moved the weights and "
            "the step is not counted yet; save after optimizer.step()"
        )
    states, table = optimizer._states, optimizer._table
    states.wait()
    state_dict["state"] = states.as_dtensors(state_dict["state"])
    selection = {
        **identity_of(optimizer),
        "step": optimizer.num_steps,
        "policy_state": optimizer.policy.state(),
        "update_counts": optimizer.update_counts,
        "border_state": optimizer._borders.state(),
        "in_use": _in_use(optimizer),
        "resident": [name for name in optimizer.blocks if name in states.resident],
        "moved_bytes": states.moved_bytes,
        "num_passes": optimizer._hooks.num_passes_before,
        "num_shorter": optimizer._hooks.num_shorter,
        "weights": optimizer._watch.fingerprints() if optimizer.num_steps else {},
        "reach": optimizer._pass_hooks.reach.state(),
        "with_state": [name for name, parameter in table.named() if states.exists(parameter)],
    }
    state_dict["selection"] = selection = plain_numbers(selection)
    if any(map(is_dtensor, table.all())):
        state_dict["state"] = states.filled(state_dict["state"], is_to_load=not optimizer._may_freeze())
    state_dict["param_groups"] = plain_numbers(state_dict["param_groups"])
    state_dict["param_groups"][0]["selection"] = as_text(selection)
    return state_dict


def read_state_dict(optimizer: BlockOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Continue from the optimizer that wrote `state_dict`.

    Raises:
        UsageError: written by another optimizer, or for another model, partition or policy; says what differs.
    """
    saved_groups = state_dict["param_groups"]
    selection = selection_of(state_dict)
    if "selection" not in state_dict and optimizer._agreement is not None and optimizer._agreement.has_begun:
        raise UsageError(
            "torch.distributed.checkpoint passes on only the state of parameters that are trainable now; load "
            "before the first forward pass, as a resuming Trainer does"
        )
    check_same({"borders": {}, **selection}, identity_of(optimizer))
    _say_other_use(selection.get("in_use"), _in_use(optimizer))
    states = optimizer._states
    states.load(states_by_name(state_dict, selection, optimizer._table.names), resident=selection["resident"])
    optimizer._updates.forget()
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        group.update({key: value for key, value in saved.items() if key not in NOT_OF_A_GROUP})
    optimizer._step = selection["step"]
    optimizer._hooks.num_passes_before = selection.get("num_passes", 0)
    optimizer._hooks.num_shorter = selection.get("num_shorter", 0)
    optimizer._selection.update_counts = dict(selection["update_counts"])
    optimizer.policy.load_state(selection["policy_state"])
    optimizer._borders.load_state(selection.get("border_state"))
    optimizer._pass_hooks.reach.begin(selection.get("reach"))
    optimizer._propose()
    states.moved_bytes += selection["moved_bytes"]


def _in_use(optimizer: BlockOptimizer) -> dict[str, bool | None]:
    """Return what the device decides where it is not given; a run that resumes may differ in it."""
    rule = optimizer.rule
    return {
        "fused": rule.fused if isinstance(rule, AdamWRule) else None,
        "frees_device": optimizer.residency.frees_device,
    }


def _say_other_use(saved: Mapping[str, bool | None] | None, ours: Mapping[str, bool | None]) -> None:
    if saved is not None and dict(saved) != dict(ours):
        logger.info(
            "the checkpoint was written with fused=%s and a residency with frees_device=%s, and the run goes on with "
            "fused=%s and frees_device=%s: the formula is the same, results are equal up to rounding",
            *(saved["fused"], saved["frees_device"], ours["fused"], ours["frees_device"]),
        )
