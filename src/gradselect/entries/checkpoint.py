"""Writer and reader of a SparseOptimizer's state_dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradselect.core import (
    NOT_OF_A_GROUP,
    as_text,
    check_present,
    check_same,
    plain_numbers,
    selection_of,
    states_by_name,
)
from gradselect.usage import UsageError

from .selector import Change

if TYPE_CHECKING:
    from .optimizer import SparseOptimizer


def identity_of(optimizer: SparseOptimizer) -> dict[str, Any]:
    """Return the facts that a checkpoint must share with the run that loads it."""
    return {
        "mask": type(optimizer.mask).__name__,
        "mask_settings": optimizer.mask.settings(),
        "rule": optimizer.rule.identity,
        "tensors": {tensor.name: list(tensor.parameter.shape) for tensor in optimizer.mask.tensors},
        "always": list(optimizer._always),
        "groups": [list(group["param_names"]) for group in optimizer.param_groups],
        "master_values": str(optimizer.master_dtype) if optimizer._is_half else "None",
    }


def _filled(optimizer: SparseOptimizer) -> dict[str, int]:
    steps = optimizer.mask.filled_steps
    return {} if steps is None else {"filled_steps": steps}


def write_state_dict(optimizer: SparseOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Add entries and `selection` (step, mask and its settings) to torch's state_dict.

    The `state` of a masked tensor holds `indices`, `joined_at`, `num_updates`, the rule's state and, for half
    precision, `master`, in the order in which entries joined. Every rank gathers the entries of all ranks, by indices
    in the whole tensor. Dense state holds DTensors where the weights are DTensors.
    """
    states, named, in_entries = optimizer._states, optimizer._table.named(), optimizer._entries.names
    dense = {index: state for index, state in state_dict["state"].items() if named[index][0] not in in_entries}
    state_dict["state"] = states.as_dtensors(dense)
    for index, (name, _) in enumerate(named):
        if name in in_entries:
            state_dict["state"][index] = optimizer._shards.gather_state(name, optimizer._entries.state(name))
    change = list(optimizer._change)
    selection = {
        **identity_of(optimizer),
        "step": optimizer.num_steps,
        "change": change,
        "num_passes": optimizer._hooks.num_passes_before,
        "num_shorter": optimizer._hooks.num_shorter,
        **_filled(optimizer),
        "weights": optimizer._watch.fingerprints() if optimizer.num_steps else {},
        "with_state": [name for name, parameter in named if name in in_entries or states.exists(parameter)],
    }
    state_dict["selection"] = selection = plain_numbers(selection)
    state_dict["param_groups"] = plain_numbers(state_dict["param_groups"])
    state_dict["param_groups"][0]["selection"] = as_text(selection)
    return state_dict


def read_state_dict(optimizer: SparseOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Continue from the optimizer that wrote `state_dict`.

    Raises:
        UsageError: written by another optimizer, or for another model or mask; says what differs.
    """
    selection = selection_of(state_dict, kind="SparseOptimizer")
    if "mask" not in selection:
        raise UsageError("this state_dict was not written by SparseOptimizer: its 'selection' has no mask")
    # Checkpoints from before there were rules hold AdamW's state.
    selection = {"rule": "AdamWRule", **selection}
    ours = identity_of(optimizer)
    if not optimizer._is_half:  # takes over the digits of masters
        del ours["master_values"]
    check_same(selection, ours)
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key not in NOT_OF_A_GROUP})
    states = states_by_name(state_dict, selection, optimizer._table.names)
    entries, shards = optimizer._entries, optimizer._shards
    check_present(states, list(entries.names))
    whole = {name: {} if name in entries.names else state for name, state in states.items()}
    optimizer._states.load(whole, resident=optimizer._dense.names)
    optimizer._updates.forget()
    entries.load({name: shards.local_state(name, states[name]) for name in entries.names})
    optimizer.mask.filled_steps = selection.get("filled_steps", optimizer.mask.filled_steps)
    optimizer._selector.count()
    optimizer._step = selection["step"]
    if optimizer._step:
        optimizer._reach.end()
    optimizer._hooks.num_passes_before = selection.get("num_passes", 0)
    optimizer._hooks.num_shorter = selection.get("num_shorter", 0)
    optimizer._change = Change(*selection["change"])
    optimizer._continue()
