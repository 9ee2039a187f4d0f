"""Which entries a compact mask chooses: asked before the step, answered from weights or from gradients as they come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.parallel import local_part

from .global_top_k import GlobalTopK
from .mask import AbstractCompactMask, AbstractMask, FromWeights, TopOfGradient
from .shards import Shards
from .store import EntryStore

Chosen = Mapping[str, tuple[Tensor, Tensor | None]]
"""By tensor name flat indices (int64, ascending), and the gradients there if the step under way is to move them."""


class Change(NamedTuple):
    """How a step's set differs from the last one's, in entries of all processes."""

    num_previous: int
    num_new: int
    num_kept: int


class EntrySelector:
    """Carries out the choices of a mask on the stores of entries. A dense mask has none, so nothing ever changes.

    Attributes:
        sizes: how many entries of each tensor are in the set, of all processes together.

    Args:
        mask: bound to the tensors of `parameters`.
        stores: hold the entries.
        parameters: the tensors that the mask chooses from, by name.
        shards: where their entries lie.
    """

    def __init__(
        self, mask: AbstractMask, stores: Sequence[EntryStore], parameters: Mapping[str, Parameter], shards: Shards
    ) -> None:
        self._mask = mask
        self._stores = tuple(stores)
        self._parameters = dict(parameters)
        self._shards = shards
        self._names = tuple(parameters)
        self._rank = {name: rank for rank, name in enumerate(self._names)}
        self.sizes: dict[str, int] = {name: 0 for store in stores for name in store.names}
        self.ask(0)

    @property
    def num_chosen(self) -> int:
        """Entries of the set, of all tensors together."""
        return sum(self.sizes.values())

    def count(self) -> None:
        """See how many entries the stores hold."""
        ours = {name: store.num_entries(name) for store in self._stores for name in store.names}
        self.sizes = self._shards.total(ours)

    def ask(self, step: int) -> None:
        """Ask the mask what step `step` chooses."""
        mask = self._mask
        self._choice = mask.choice(step, self.num_chosen) if isinstance(mask, AbstractCompactMask) else None
        self.restart()

    def restart(self) -> None:
        """Forget what was offered."""
        self._contest: GlobalTopK | None = None
        if isinstance(self._choice, TopOfGradient):
            above = -math.inf if self._choice.replace else 0.0
            self._contest = GlobalTopK(self._names, self._shards, self._choice.counts, above=above)

    def can_choose(self, name: str) -> bool:
        """Whether the gradient of the coming step may add entries of the tensor."""
        if not isinstance(self._choice, TopOfGradient):
            return False
        counts = self._choice.counts
        return (counts if isinstance(counts, int) else counts.get(name, 0)) > 0

    @property
    def only_adds(self) -> bool:
        """Whether entries of the set do not compete in the coming step."""
        return isinstance(self._choice, TopOfGradient) and not self._choice.replace

    def offer(self, name: str, gradient: Tensor) -> None:
        """Offer the entries of a tensor by their gradient (flat, shape (n,)), if the choice is by gradient."""
        if self._contest is None:
            return
        assert isinstance(self._mask, AbstractCompactMask)
        self._contest.top(name).scan(
            local_part(self._parameters[name]).detach().view(-1),
            gradient,
            rank=self._rank[name],
            score=self._mask.score,
            least=self._mask.least_gradient,
        )

    def choose_by_weights(self, step: int, model: nn.Module) -> Change:
        """Before the backward pass: put in place what the mask takes from weights, if it does so at this step."""
        if not isinstance(self._choice, FromWeights):
            return self._unchanged()
        assert isinstance(self._mask, AbstractCompactMask)
        chosen = self._mask.choose(step, model)
        nothing = torch.empty(0, dtype=torch.int64)
        return self._replace_by(
            {name: (self._shards.inside(name, chosen.get(name, nothing)), None) for name in self._names}
        )

    def choose_by_gradient(self) -> Change | None:
        """When all gradients are there: let the best of what was offered join, or stay. None: no such choice now."""
        if self._contest is None:
            return None
        chosen = self._contest.result()
        return self._join(chosen) if self.only_adds else self._replace_by(chosen)

    def _join(self, chosen: Chosen) -> Change:
        """These entries come in addition to the set."""
        before = self.num_chosen
        for store in self._stores:
            store.add({name: self._beside(name, chosen[name]) for name in store.names if name in chosen})
        self.count()
        return Change(before, self.num_chosen - before, before)

    def _replace_by(self, chosen: Chosen) -> Change:
        """These entries are the set; those that were in it keep their state. Tensors left out stay as they are."""
        num_previous, num_kept = self.num_chosen, dict[str, int]()
        for store in self._stores:
            kept, newcomers = {}, {}
            for name in store.names:
                if name not in chosen:
                    num_kept[name] = store.num_entries(name)
                    continue
                indices, gradients = self._beside(name, chosen[name])
                old = store.indices(name).long()
                kept[name] = torch.isin(old, indices, assume_unique=True)
                is_new = torch.isin(indices, old, assume_unique=True, invert=True)
                newcomers[name] = (indices[is_new], None if gradients is None else gradients[is_new])
                num_kept[name] = int(kept[name].count_nonzero())
            store.keep(kept)
            store.add(newcomers)
        self.count()
        num_stayed = sum(self._shards.total(num_kept).values())
        return Change(num_previous, self.num_chosen - num_stayed, num_stayed)

    def _unchanged(self) -> Change:
        num_chosen = self.num_chosen
        return Change(num_chosen, 0, num_chosen)

    def _beside(self, name: str, chosen: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """On the tensor's device."""
        device = self._parameters[name].device
        indices, gradients = chosen
        return indices.to(device), None if gradients is None else gradients.to(device)
