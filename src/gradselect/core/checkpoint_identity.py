"""Identity of a checkpoint: the facts that it must share with the run that loads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, Protocol

from gradselect.usage import UsageError, find_differences

SELECTION_KEY = "selection"
"""Key of the first parameter group; in a state_dict it holds the selection as text, else nothing."""

NOT_OF_A_GROUP = ("params", "param_names", SELECTION_KEY)
"""Keys of a saved parameter group that are no hyper-parameters."""


class CheckpointFormat(Protocol):
    """Reader and writer of all that a state_dict holds beside `state` and `param_groups`."""

    def identity_of(self, optimizer: Any, /) -> dict[str, Any]:
        """Return what a checkpoint and the run that loads it must agree on."""
        ...

    def write_state_dict(self, optimizer: Any, state_dict: dict[str, Any], /) -> dict[str, Any]:
        """Complete torch's state_dict."""
        ...

    def read_state_dict(self, optimizer: Any, state_dict: Mapping[str, Any], /) -> None:
        """Continue from a completed state_dict."""
        ...


@contextmanager
def loading(optimizer: Any, state_dict: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Run the hooks that torch's `load_state_dict` runs, and yield what is to be loaded.

    Raises:
        UsageError: it is no state_dict.
    """
    check_is_state_dict(state_dict)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(optimizer, dict(state_dict)) or state_dict
    yield state_dict
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)


def check_is_state_dict(value: Any) -> None:
    """Check that `value` is what an optimizer's `state_dict()` returns, of whatever optimizer.

    Raises:
        UsageError: it is something else, such as a whole checkpoint.
    """
    if isinstance(value, Mapping) and value.get("param_groups") and "state" in value:
        return
    what = f"{type(value).__name__} of {len(value)}" if isinstance(value, Sequence) else repr(value)
    if isinstance(value, Mapping):
        what = f"with the keys {_short([*value])}"
    advice = "pass what optimizer.state_dict() returned"
    holding = [key for key, part in value.items() if _holds_groups(part)] if isinstance(value, Mapping) else []
    if holding:
        advice = f"it is under the key {holding[0]!r}: load_state_dict(checkpoint[{holding[0]!r}])"
    raise UsageError(f"this is no state_dict of an optimizer, which has 'state' and 'param_groups': {what}; {advice}")


def _holds_groups(value: Any) -> bool:
    return isinstance(value, Mapping) and "param_groups" in value


def check_same(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Check that `saved` holds every key of `ours` with an equal value.

    Raises:
        UsageError: names the first key that differs, and both values, or the first that is missing.
    """
    for what, value in ours.items():
        if what not in saved:
            raise UsageError(
                f"the checkpoint does not say what its {what.replace('_', ' ')} was: an older version of gradselect "
                "wrote it, or another optimizer; resume with the version that wrote it, or start again from the weights"
            )
        if _plain(saved[what]) != _plain(value):
            difference = _difference(_plain(saved[what]), _plain(value))
            raise UsageError(f"the checkpoint is of another run: {what.replace('_', ' ')}: {difference}")


def plain_numbers(value: Any) -> Any:
    """Return plain values with Python's own numbers and texts in place of others, such as NumPy's.

    `torch.load(weights_only=True)` refuses those.
    """
    if isinstance(value, Mapping):
        return {plain_numbers(key): plain_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return (tuple if isinstance(value, tuple) else list)(map(plain_numbers, value))
    if isinstance(value, bool):
        return value
    kinds = {Integral: int, Real: float, str: str}
    return next((own(value) for kind, own in kinds.items() if isinstance(value, kind)), value)


def as_text(selection: Mapping[str, Any]) -> str:
    """Return `selection` as one string, which can travel in a parameter group."""
    return json.dumps(selection)


def selection_of(state_dict: Mapping[str, Any], *, kind: str = "BlockOptimizer") -> dict[str, Any]:
    """Return `selection` of a state_dict, from the text in the first group if torch.distributed.checkpoint dropped it.

    Raises:
        UsageError: neither is there.
    """
    if "selection" in state_dict:
        return state_dict["selection"]
    if not state_dict["param_groups"][0].get(SELECTION_KEY):
        raise UsageError(
            f"this state_dict was not written by {kind}: it has no key 'selection', not even in its first parameter "
            "group. If something rebuilds state_dicts on the way, let it keep the keys of the groups, or save and load "
            "with gradselect.integrations.distributed"
        )
    return json.loads(state_dict["param_groups"][0][SELECTION_KEY])


def states_by_name(
    state_dict: Mapping[str, Any], selection: Mapping[str, Any], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the state of each parameter, by name; empty where zeros stand for a missing state.

    Raises:
        UsageError: a state that was written is not there any more.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    with_state = selection.get("with_state", names)
    states = {
        name: state_dict["state"].get(key, {}) if name in with_state else {}
        for name, key in zip(names, keys, strict=True)
    }
    if "with_state" in selection:
        check_present(states, [name for name in with_state if name in states])
    return states


def check_present(states: Mapping[str, Any], names: Sequence[str]) -> None:
    """Check that the state of these parameters is in a state_dict.

    Raises:
        UsageError: it is not; names the first.
    """
    missing = [name for name in names if not states[name]]
    if missing:
        raise UsageError(
            f"the state of {len(missing)} of {len(names)} parameters was lost on the way, of {missing[0]!r} first. "
            "torch.distributed.checkpoint.state_dict keeps the state of trainable parameters only; save and load with "
            "gradselect.integrations.distributed"
        )


def _plain(value: Any) -> Any:
    """Replace tuples by lists: a checkpoint may have passed through a format without tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _difference(theirs: Any, ours: Any) -> str:
    """Describe the first difference between two plain values in one line."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key, old, new in find_differences(theirs, ours):
            return f"{key}={_short(old)} there, {key}={_short(new)} here"
    return f"{_short(theirs)} there, {_short(ours)} here"


def _short(value: Any, *, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
