"""What a checkpoint must agree on with the run that loads it; what others make of it on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gradselect.usage import UsageError, find_differences


def check_same(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Every entry of `ours` stands in `saved` with an equal value.

    Raises:
        UsageError: names the first entry that differs, and both values, or the first that is not there.
    """
    for what, value in ours.items():
        if what not in saved:
            raise UsageError(
                f"the checkpoint does not say what its {what.replace('_', ' ')} was: an older version of gradselect "
                "wrote it, or another optimizer; go on with what wrote it, or begin anew from the weights alone"
            )
        if _plain(saved[what]) != _plain(value):
            difference = _difference(_plain(saved[what]), _plain(value))
            raise UsageError(f"the checkpoint is of another run: its {what.replace('_', ' ')} {difference}")


def as_text(selection: Mapping[str, Any]) -> str:
    """`selection` as one plain value, which travels with a parameter group."""
    return json.dumps(selection)


def selection_of(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of this name, or its text in the first group where torch.distributed.checkpoint has dropped it.

    Raises:
        UsageError: there is neither.
    """
    if "selection" in state_dict:
        return state_dict["selection"]
    if "selection" not in state_dict["param_groups"][0]:
        raise UsageError(
            "this state_dict was not written by BlockOptimizer: it has no entry 'selection'. Where "
            "torch.distributed.checkpoint.state_dict has passed it on, which keeps that of sharded models alone, save "
            "and load with gradselect.integrations.distributed"
        )
    return json.loads(state_dict["param_groups"][0]["selection"])


def states_by_name(
    state_dict: Mapping[str, Any], selection: Mapping[str, Any], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What a state_dict holds of each parameter, by name; zeros that stand in for no state are left out."""
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    with_state = selection.get("with_state", names)
    return {
        name: state_dict["state"].get(key, {}) if name in with_state else {}
        for name, key in zip(names, keys, strict=True)
    }


def _plain(value: Any) -> Any:
    """Tuples as lists: a checkpoint may have passed through a format that knows lists only."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _difference(theirs: Any, ours: Any) -> str:
    """Describe the first difference between two plain values in one line."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key, old, new in find_differences(theirs, ours):
            return f"have {key}={_short(old)}, this run's {key}={_short(new)}"
    return f"are {_short(theirs)}, this run's {_short(ours)}"


def _short(value: Any, *, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
