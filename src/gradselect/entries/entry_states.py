"""State of all selected entries, in one store for each set of tensors that can be updated together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradselect.core import AbstractRule, Group, squared_norm
from gradselect.parallel import local_part, shard_groups

from .store import EntryStore


class EntryStates:
    """Stores of a model's selected entries.

    A store holds tensors that share parameter group, device, dtype and sharding.

    Attributes:
        stores: all of them.

    Args:
        groups: the optimizer's `param_groups`.
        names: of the tensors that the mask selects from.
        rule: the update formula.
        master_dtype: dtype of masters of bf16 and fp16 weights; None: none.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        names: Collection[str],
        *,
        rule: AbstractRule,
        master_dtype: torch.dtype | None,
    ) -> None:
        apart: dict[Any, dict[str, Parameter]] = {}
        for index, group in enumerate(groups):
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if name in names:
                    key = (index, parameter.device, parameter.dtype, shard_groups(parameter))
                    apart.setdefault(key, {})[name] = parameter
        self._groups = groups
        self._by_group = [
            (index, EntryStore(parameters, rule=rule, master_dtype=master_dtype))
            for (index, *_), parameters in apart.items()
        ]
        self.stores = tuple(store for _, store in self._by_group)
        self._store_of = {name: store for store in self.stores for name in store.names}
        self._defects: dict[EntryStore, Tensor] = {}
        self._first = {
            store: next(iter(parameters.values()))
            for store, parameters in zip(self.stores, apart.values(), strict=True)
        }

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors."""
        return self._store_of.keys()

    def indices(self, name: str) -> Tensor:
        """Flat indices of the tensor's entries in the order in which they joined. Shape (n,)."""
        return self._store_of[name].indices(name)

    def num_entries(self) -> dict[str, int]:
        """Number of selected entries of each tensor in this rank's local part."""
        return {name: store.num_entries(name) for name, store in self._store_of.items()}

    def follow_model(self) -> None:
        """Go along with a model that was moved or cast since the last step; see `EntryStore.follow_model`."""
        for store in self.stores:
            store.follow_model()

    def read(self, name: str, gradient: Tensor, *, clear: bool) -> None:
        """Add to the gradients of a tensor's entries; see `EntryStore.read`."""
        self._store_of[name].read(name, gradient, clear=clear)

    def inspect(self, name: str, gradient: Tensor) -> None:
        """Make the norm NaN until `selected`, if this gradient, by which entries are selected, is not finite."""
        store = self._store_of[name]
        self._defects[store] = self._defects.get(store, 0.0) + 0.0 * squared_norm(gradient)

    def selected(self) -> None:
        """Count from now on the gradients of selected entries only."""
        self._defects.clear()

    @property
    def has_gradients(self) -> bool:
        """True if a gradient has been read."""
        return any(store.has_gradients for store in self.stores)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that were read."""
        return sum(store.gradient_bytes for store in self.stores)

    def squared_norms(self) -> list[tuple[Tensor, Tensor]]:
        """Sums of squares of the gradients that were read, each with a tensor that is sharded as they are.

        NaN if the coming selection is made from a gradient that is not finite.
        """
        return [(self._first[store], store.squared_norm() + self._defects.get(store, 0.0)) for store in self.stores]

    def squared_norms_of(
        self, gradients: Mapping[str, Tensor], *, decides: Callable[[str], bool]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return what `squared_norms` would after these whole gradients were read.

        Args:
            gradients: by tensor name.
            decides: True if entries of a tensor are selected by its gradient.
        """
        squares = []
        for name, gradient in gradients.items():
            if name not in self.names:
                continue
            flat = local_part(gradient).reshape(-1)
            square = squared_norm(flat[self.indices(name).long()])
            squares.append((gradient, square + 0.0 * squared_norm(flat) if decides(name) else square))
        return squares

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply all gradients, as clipping does."""
        for store in self.stores:
            store.scale_gradients(factor)

    def update(self) -> None:
        """Apply the rule once to every entry whose tensor had a gradient."""
        for index, store in self._by_group:
            store.update(self._groups[index])

    def take_moved(self) -> dict[Tensor, Tensor | None]:
        """Return what `EntryStore.take_moved` does, by parameter."""
        found = [(store.parameters[name], each) for store in self.stores for name, each in store.take_moved().items()]
        return dict(found)

    @property
    def refreshed(self) -> tuple[str, ...]:
        """Tensors whose masters took over weights in the last update, with their neighbours in the same run."""
        return tuple(name for store in self.stores for name in store.refreshed)

    def restart(self) -> None:
        """Forget the gradients that were read."""
        self._defects.clear()
        for store in self.stores:
            store.restart()

    def refresh_masters(self) -> None:
        """Set master weights to the weights."""
        for store in self.stores:
            store.refresh_masters()

    def num_bytes(self) -> tuple[int, int]:
        """Bytes of the masters, and of everything else."""
        sizes = [store.num_bytes() for store in self.stores]
        return sum(masters for masters, _ in sizes), sum(others for _, others in sizes)

    def state(self, name: str) -> dict[str, Tensor]:
        """Return the state of one tensor for a checkpoint; see `EntryStore.state`."""
        return self._store_of[name].state(name)

    def load(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load what `state` returned, for every tensor."""
        for store in self.stores:
            store.load(states)
