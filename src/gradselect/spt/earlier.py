"""The choice of an earlier conversion, read from the state of its optimizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradselect.core import selection_of, states_by_name
from gradselect.usage import join, parent

from .choice import Candidate, Choice

ADAPTER = "default"
"""Name of the adapter in PEFT's layers."""


def earlier_choice(state_dict: Mapping[str, Any], candidates: Sequence[Candidate], *, budget: int) -> Choice | None:
    """Return the choice of the conversion whose `SparseOptimizer` wrote `state_dict`.

    Args:
        state_dict: of the optimizer.
        candidates: of the model, which is not converted yet.
        budget: number of entries to train.

    Returns:
        The choice; None if it cannot be told apart from what else trained, or its numbers are not those of a choice
        among these candidates.
    """
    selection = selection_of(state_dict, kind="SparseOptimizer")
    if selection.get("mask") != "FixedEntries":
        return None
    always, masked = set(selection["always"]), set(selection["tensors"])
    states = states_by_name(state_dict, selection, [name for group in selection["groups"] for name in group])
    adapters = [each for each in candidates if each.form == "adapter" and _factor(each) in always]
    layers = {parent(each.tensor.name) for each in adapters}
    names = {each.tensor.name: _name_now(each.tensor.name, layers) for each in candidates}
    whole = [each for each in candidates if each.form == "whole" and names[each.tensor.name] in always]
    choice = Choice(
        budget=budget,
        adapters=tuple(each.tensor.name for each in adapters),
        whole=tuple(each.tensor.name for each in whole),
        entries={name: _indices(states[now]) for name, now in names.items() if now in masked},
        num_adapter_entries=sum(each.cost for each in adapters),
        num_whole=sum(each.cost for each in whole),
        num_candidates=len(candidates),
    )
    return choice if choice.describe() == selection["mask_settings"].get("about") else None


def _factor(candidate: Candidate) -> str:
    return join(parent(candidate.tensor.name), f"lora_A.{ADAPTER}.weight")


def _name_now(name: str, layers: Collection[str]) -> str:
    """Return the name of a parameter after PEFT has wrapped these layers."""
    above, _, last = name.rpartition(".")
    return f"{above}.base_layer.{last}" if above in layers else name


def _indices(state: Mapping[str, Tensor]) -> Tensor:
    return state["indices"].long().sort().values
