"""Ways in which others pass an optimizer's state on: `WAYS[name](model, optimizer, again, resumed, folder=...)`."""

from __future__ import annotations

import copy
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)


def step_idly(optimizer):
    """Step with zero gradients at rate 0, as torch and torchtitan do to have state to load into."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()


def flat(optimizer):
    """Flatten a state_dict by parameter name, as pipelines do: only `state` and the keys of the groups remain."""
    saved = optimizer.state_dict()
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    found = {
        f"state.{names[number]}.{key}": value
        for number, state in saved["state"].items()
        for key, value in state.items()
    }
    for group, live in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for name in live["param_names"]:
            found |= {f"group.{name}.{key}": group[key] for key in group if key not in ("params", "param_names")}
    return found


def load_flat(optimizer, found):
    """Rebuild a state_dict from the state and the keys that the new optimizer has."""
    state, groups, number = {}, [], 0
    for group in optimizer.param_groups:
        numbers = []
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            kinds = [key for key in optimizer.state.get(parameter, {}) if f"state.{name}.{key}" in found]
            if kinds:
                state[number] = {key: found[f"state.{name}.{key}"] for key in kinds}
            numbers.append(number)
            number += 1
        first = group["param_names"][0]
        keys = [key for key in group if key not in ("params", "param_names")]
        groups.append({"params": numbers, **{key: found[f"group.{first}.{key}"] for key in keys}})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def by_hand(model, optimizer, again, resumed, *, folder):
    step_idly(optimizer)
    found = copy.deepcopy(flat(optimizer))
    step_idly(resumed)
    load_flat(resumed, found)


def by_files(model, optimizer, again, resumed, *, folder):
    """Write files, and load them into the tensors of a flat state_dict, in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        step_idly(optimizer)
        dcp.save(flat(optimizer), checkpoint_id=folder)
        step_idly(resumed)
        found = flat(resumed)
        dcp.load(found, checkpoint_id=folder)
    step_idly(resumed)
    load_flat(resumed, found)


def by_torch(model, optimizer, again, resumed, *, flatten):
    # A block that was never selected has no state, which torch takes for a fault unless told otherwise.
    options = StateDictOptions(flatten_optimizer_state_dict=flatten, strict=False)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    set_optimizer_state_dict(again, resumed, copy.deepcopy(saved), options=options)


WAYS = {
    "by hand, flat": by_hand,
    "by files": by_files,
    "by torch": lambda *parts, folder: by_torch(*parts, flatten=False),
    "by torch, flat": lambda *parts, folder: by_torch(*parts, flatten=True),
}
