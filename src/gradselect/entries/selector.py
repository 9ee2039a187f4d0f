"""Selection of entries by a compact mask: from weights before the step, or from gradients as they arrive."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.core import SELECTION, Phases, in_phase
from gradselect.parallel import local_part

from .entry_states import EntryStates
from .global_top_k import GlobalTopK
from .mask import AbstractCompactMask, AbstractMask, FromWeights, TopOfGradient
from .shards import Shards

logger = logging.getLogger(__name__)

Selected = Mapping[str, tuple[Tensor, Tensor | None]]
"""By tensor name: flat indices (int64, ascending), and gradients there if the current step moves these entries."""


class Change(NamedTuple):
    """Difference between the sets of two steps, in numbers of entries over all ranks."""

    num_previous: int
    num_new: int
    num_kept: int


class EntrySelector:
    """Carries out the choices of a compact mask. A dense mask makes none, so nothing changes.

    Attributes:
        sizes: number of entries of each tensor in the set, over all ranks.

    Args:
        mask: bound to the tensors of `parameters`.
        entries: hold the set.
        parameters: tensors that the mask selects from, by name.
        shards: locate their entries.
        phases: of the optimizer.
    """

    def __init__(
        self,
        mask: AbstractMask,
        entries: EntryStates,
        parameters: Mapping[str, Parameter],
        shards: Shards,
        *,
        phases: Phases,
    ) -> None:
        self._mask = mask
        self._entries = entries
        self._parameters = dict(parameters)
        self._shards = shards
        self._phases = phases
        self._names = tuple(parameters)
        self._position = {name: position for position, name in enumerate(self._names)}
        self.sizes: dict[str, int] = dict.fromkeys(entries.names, 0)
        self._said: set[str] = set()
        self.ask(0)

    @property
    def num_selected(self) -> int:
        """Number of entries in the set, over all tensors and ranks."""
        return sum(self.sizes.values())

    def count(self) -> None:
        """Update `sizes` from the stores."""
        self.sizes = self._shards.total(self._entries.num_entries())

    def ask(self, step: int) -> None:
        """Ask the mask for its choice at step `step`."""
        mask = self._mask
        self._choice = mask.choice(step, self.num_selected) if isinstance(mask, AbstractCompactMask) else None
        self.restart()

    def restart(self) -> None:
        """Forget the gradients ranked so far."""
        self._top: GlobalTopK | None = None
        if isinstance(self._choice, TopOfGradient):
            above = -math.inf if self._choice.replace else 0.0
            self._top = GlobalTopK(self._names, self._shards, self._choice.counts, above=above)

    def can_select(self, name: str) -> bool:
        """True if the gradient of the next step may add entries of the tensor."""
        if not isinstance(self._choice, TopOfGradient):
            return False
        counts = self._choice.counts
        return (counts if isinstance(counts, int) else counts.get(name, 0)) > 0

    def planned(self) -> Mapping[str, int]:
        """Number of entries of each tensor that holds some, or has a budget of its own for the coming step."""
        counts = self._choice.counts if isinstance(self._choice, TopOfGradient) else {}
        return self.sizes if isinstance(counts, int) or not counts else counts

    @property
    def only_adds(self) -> bool:
        """True if entries stay in the set at the next step, whatever their gradients."""
        return isinstance(self._choice, TopOfGradient) and not self._choice.replace

    @in_phase(SELECTION)
    def see(self, name: str, gradient: Tensor) -> None:
        """Rank the entries of a tensor by their gradient (flat, shape (n,)), if the mask selects by gradient."""
        if self._top is None:
            return
        assert isinstance(self._mask, AbstractCompactMask)
        self._top.top(name).scan(
            local_part(self._parameters[name]).detach().view(-1),
            gradient,
            position=self._position[name],
            score=self._mask.score,
            least=self._mask.least_gradient,
        )

    def select_by_weights(self, step: int, model: nn.Module) -> Change:
        """Select entries by weights, before the backward pass, if the mask does so at this step."""
        if not isinstance(self._choice, FromWeights):
            return Change(self.num_selected, 0, self.num_selected)
        assert isinstance(self._mask, AbstractCompactMask)
        selected = self._mask.choose(step, model)
        nothing = torch.empty(0, dtype=torch.int64)
        return self._replace_by(
            {name: (self._shards.to_local(name, selected.get(name, nothing)), None) for name in self._names}
        )

    @in_phase(SELECTION)
    def select_by_gradient(self, *, is_whole: bool, is_in_parts: bool = False) -> Change | None:
        """Select entries by gradient, after the backward pass; None if the mask does not do so at this step.

        The set stays as it is if the gradient tells nothing: it is zero, or not that of the whole step.

        Args:
            is_whole: False if a backward pass of the step, or another part of a gradient, has come after `see`.
            is_in_parts: True if that was a part.
        """
        if self._top is None:
            return None
        winners = self._top.result()
        self._entries.selected()
        if reason := self._reason_to_wait(winners, is_whole=is_whole, is_in_parts=is_in_parts):
            if reason not in self._said:
                self._said.add(reason)
                logger.warning("a step selects no entries by gradient, and leaves that to a later one: %s", reason)
            return Change(self.num_selected, 0, self.num_selected)
        return self._join(winners) if self.only_adds else self._replace_by(winners)

    def _reason_to_wait(self, winners: Selected, *, is_whole: bool, is_in_parts: bool) -> str | None:
        """Return why nothing can be selected by this gradient, on any rank; None: it can."""
        if any(self._shards.total(dict.fromkeys(self._names, int(not is_whole))).values()):
            if is_in_parts:
                return "gradients arrived in several parts within one backward pass"
            return (
                "it has more backward passes than accumulation_steps announces. From the next step on as many are "
                "expected as this one has; with accumulation_steps=<backward passes per step> that holds at once"
            )
        if not self.only_adds:
            nonzero = {name: int(bool(each.any())) for name, (_, each) in winners.items() if each is not None}
            if not any(self._shards.total(dict.fromkeys(self._names, 0) | nonzero).values()):
                return "all its gradients are zero"
        return None

    def _join(self, selected: Selected) -> Change:
        """Add entries to the set."""
        before = self.num_selected
        for store in self._entries.stores:
            store.add({name: self._on_device(name, selected[name]) for name in store.names if name in selected})
        self.count()
        return Change(before, self.num_selected - before, before)

    def _replace_by(self, selected: Selected) -> Change:
        """Replace the set in the tensors of `selected`; entries that stay keep their state."""
        num_previous, num_kept = self.num_selected, dict[str, int]()
        for store in self._entries.stores:
            kept, newcomers = {}, {}
            for name in store.names:
                if name not in selected:
                    num_kept[name] = store.num_entries(name)
                    continue
                indices, gradients = self._on_device(name, selected[name])
                old = store.indices(name).long()
                kept[name] = torch.isin(old, indices, assume_unique=True)
                is_new = torch.isin(indices, old, assume_unique=True, invert=True)
                newcomers[name] = (indices[is_new], None if gradients is None else gradients[is_new])
                num_kept[name] = int(kept[name].count_nonzero())
            store.keep(kept)
            store.add(newcomers)
        self.count()
        num_stayed = sum(self._shards.total(num_kept).values())
        return Change(num_previous, self.num_selected - num_stayed, num_stayed)

    def _on_device(self, name: str, selected: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        device = self._parameters[name].device
        indices, gradients = selected
        return indices.to(device), None if gradients is None else gradients.to(device)
