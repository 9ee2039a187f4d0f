"""Compact optimizer state: indices, moments and masters of selected entries only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradselect.core import HALF, MASTER, AbstractRule, agrees, index_dtype, take_over, unrounded
from gradselect.parallel import local_part
from gradselect.usage import UsageError

from .cohorts import Cohorts
from .moved import MovedEntries
from .segments import Segments

Group = Mapping[str, Any]

RUN = 1 << 22
"""Number of entries that are updated together, unless one tensor has more; sets the update's temporary memory."""


class EntryStore:
    """Selected entries of several tensors, and their state, in one flat array of each kind.

        indices      flat index in its tensor      4 bytes (8 in tensors of more than 2^31 entries)
        state        of the rule, e.g. exp_avg     4 each
        master       float32 weight                4, of half-precision tensors only

    State and masters of float64 tensors, or with another `master_dtype`, have that dtype. Entries are sorted by tensor,
    then in the order in which they joined. Each rank holds the entries of its local parts.

    Args:
        parameters: the tensors, by name; they share device, dtype and parameter group.
        rule: the update formula.
        master_dtype: dtype of master weights of half-precision tensors, and of the state beside them; None: no masters.

    Attributes:
        parameters: as given.
        refreshed: tensors of the runs of the last update in which masters took over weights that others had changed.
    """

    def __init__(
        self, parameters: Mapping[str, Parameter], *, rule: AbstractRule, master_dtype: torch.dtype | None
    ) -> None:
        self.names = tuple(parameters)
        self.parameters = dict(parameters)
        self._rule = rule
        self._segments = Segments(self.names)
        first = next(iter(parameters.values()))
        is_half = first.dtype in HALF
        dtype = (is_half and master_dtype) or torch.promote_types(first.dtype, torch.float32)
        largest = max(local_part(parameter).numel() for parameter in parameters.values())
        self._indices = torch.empty(0, dtype=index_dtype(largest), device=first.device)
        self._master_dtype = master_dtype
        self.refreshed: list[str] = []
        kinds = (*rule.state_names, *((MASTER,) if is_half and master_dtype else ()))
        self._empty = torch.empty(0, dtype=dtype, device=first.device)
        self._arrays = {kind: self._empty.clone() for kind in kinds}
        self._cohorts = Cohorts(len(self.names), index_dtype=self._indices.dtype, device=first.device)
        self._moved = MovedEntries()
        self.restart()

    # Gradients of the current step ---------------------------------------------------------------------------------

    def restart(self) -> None:
        """Forget the gradients that were read."""
        self._gradients: Tensor | None = None
        self._plain_indices: Tensor | None = None
        self._was_read: set[str] = set()

    def read(self, name: str, gradient: Tensor, *, clear: bool = False) -> None:
        """Add to the gradients of a tensor's entries.

        Args:
            name: of the tensor.
            gradient: flat, shape (n,).
            clear: set `gradient` to zero at the entries.
        """
        if self._gradients is None:
            self._follow_device()
            self._gradients = torch.zeros_like(self._indices, dtype=self._empty.dtype)
        self._was_read.add(name)
        part = self._segments.slice_of(name)
        if part.start < part.stop:
            places = self._plain()[part]
            self._gradients[part] += gradient.index_select(0, places)
            if clear:
                gradient.index_fill_(0, places.long(), 0.0)

    @property
    def has_gradients(self) -> bool:
        """True if a gradient of one of the tensors has been read."""
        return bool(self._was_read)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that were read."""
        return 0 if self._gradients is None else self._gradients.nbytes

    def squared_norm(self) -> Tensor:
        """Sum of the squares of the gradients that were read. Shape ()."""
        return torch.zeros(()) if self._gradients is None else self._gradients.square().sum()

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply all gradients, as clipping does."""
        if self._gradients is not None:
            self._gradients.mul_(factor.to(self._gradients.device))

    # The set ------------------------------------------------------------------------------------------------------

    def indices(self, name: str) -> Tensor:
        """Flat indices of the tensor's entries in the order in which they joined. Shape (n,), the index dtype."""
        return self._cohorts.plain(self._indices[self._segments.slice_of(name)])

    def num_entries(self, name: str) -> int:
        """Number of selected entries of the tensor."""
        return self._segments.count(name)

    def add(self, newcomers: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
        """Let entries join, as one cohort in each tensor.

        Args:
            newcomers: by tensor name flat indices (int64, ascending, none selected yet), and gradients if the current
                step moves these entries: for all tensors or for none.
        """
        newcomers = {name: new for name, new in newcomers.items() if new[0].numel()}
        if not newcomers:
            return
        self._plain_indices = None
        flagged = {
            name: self._cohorts.join(self._segments.position[name], new.to(self._indices.dtype))
            for name, (new, _) in newcomers.items()
        }
        self._indices = self._segments.appended(self._indices, flagged)
        gradients = {name: gradient for name, (_, gradient) in newcomers.items() if gradient is not None}
        assert len(gradients) == (0 if self._gradients is None else len(newcomers))
        if self._gradients is not None:
            self._gradients = self._segments.appended(self._gradients, gradients)
        for kind, array in self._arrays.items():
            initial = {name: self._initial(kind, name, new) for name, (new, _) in newcomers.items()}
            self._arrays[kind] = self._segments.appended(array, initial)
        self._segments.grow({name: new.numel() for name, (new, _) in newcomers.items()})

    def keep(self, kept: Mapping[str, Tensor]) -> None:
        """Keep these entries, with state and age, and drop the others.

        Args:
            kept: by tensor name a bool tensor over its entries, in the order of `indices`; tensors that are left out
                keep all.
        """
        kept = {name: mask for name, mask in kept.items() if not bool(mask.all())}
        if not kept:
            return
        for name, mask in kept.items():
            self._moved.leave(name, self._flat(name), lambda name=name, mask=mask: self._moved_indices(name, ~mask))
        everywhere = torch.cat(
            [kept.get(name, self._indices.new_ones(self.num_entries(name), dtype=torch.bool)) for name in self.names]
        )
        joined_at = {name: self._joined_at(name)[mask] for name, mask in kept.items()}
        self._plain_indices = None
        self._indices = self._indices[everywhere]
        self._arrays = {kind: array[everywhere] for kind, array in self._arrays.items()}
        if self._gradients is not None:
            self._gradients = self._gradients[everywhere]
        self._segments.grow({name: int(mask.sum()) - mask.numel() for name, mask in kept.items()})
        for name, updates in joined_at.items():
            self._rewrite_cohorts(name, updates)

    def state(self, name: str) -> dict[str, Tensor]:
        """Return what a checkpoint keeps of one tensor, copied.

        Returns:
            `indices`, `joined_at` (number of the tensor's updates before an entry joined, int32), `num_updates` (of the
            tensor, shape ()), and the rule's state and masters.
        """
        part = self._segments.slice_of(name)
        return {
            "indices": self.indices(name).clone(),
            "joined_at": self._joined_at(name).to(torch.int32),
            "num_updates": torch.tensor(self._cohorts.num_updates[self._segments.position[name]]),
            **{kind: array[part].clone() for kind, array in self._arrays.items()},
        }

    def load(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load what `state` returned, for every tensor."""
        self._moved.lose_track()
        device = self._indices.device
        ordered = [states[name] for name in self.names]
        self._indices = torch.cat([state["indices"].to(device, self._indices.dtype) for state in ordered])
        # Masters of a run in half precision are loaded in fp32 too: the next step gives their digits to the weights.
        kinds = (*self._rule.state_names, *((MASTER,) if all(MASTER in state for state in ordered) else ()))
        self._arrays = {
            kind: torch.cat([state[kind].to(device, self._empty.dtype) for state in ordered]) for kind in kinds
        }
        self._segments.reset({name: states[name]["indices"].numel() for name in self.names})
        self._cohorts.num_updates = [int(state["num_updates"]) for state in ordered]
        self._cohorts.forget()
        for name, state in zip(self.names, ordered, strict=True):
            self._rewrite_cohorts(name, state["joined_at"].to(device))
        self.restart()

    def num_bytes(self) -> tuple[int, int]:
        """Bytes of the masters, and of everything else."""
        sizes = {kind: array.nbytes for kind, array in self._arrays.items()}
        masters = sizes.pop(MASTER, 0)
        return masters, sum(sizes.values()) + self._indices.nbytes + self._cohorts.nbytes

    # The update ---------------------------------------------------------------------------------------------------

    def update(self, group: Group) -> None:
        """Apply the rule once to every entry whose tensor had a gradient."""
        self.refreshed.clear()
        if self._gradients is not None:
            for names in self._runs():
                self._update_run(names, group)
        self._moved.touch(self._was_read)
        self.restart()

    def take_moved(self) -> Mapping[str, Tensor | None]:
        """Return flat indices (int64, ascending) of entries that moved since the last call, by tensor; None: all."""
        return self._moved.take(self._moved_indices)

    def _moved_indices(self, name: str, among: Tensor | None = None) -> Tensor:
        """Indices of the entries that took part in the tensor's last update, `among` those of a bool mask over them."""
        is_moved = self._joined_at(name) < self._cohorts.num_updates[self._segments.position[name]]
        return self.indices(name)[is_moved if among is None else is_moved & among].long()

    def follow_model(self) -> None:
        """Go along with a model that was moved to another device, or cast, since the last step.

        Weights that were cast to half precision get masters; those that were cast from it take over the digits of
        theirs, which are dropped.

        Raises:
            UsageError: the tensors are now on several devices.
        """
        self._follow_device()
        is_half = self._flat(self.names[0]).dtype in HALF
        if MASTER in self._arrays and not is_half:
            masters = self._arrays.pop(MASTER)
            for name in self.names:
                flat, places = self._flat(name), self.indices(name).long()
                weights = flat[places]
                unrounded(weights, masters[self._segments.slice_of(name)])
                flat.index_copy_(0, places, weights)
        elif self._master_dtype is not None and MASTER not in self._arrays and is_half:
            self._arrays[MASTER] = self._empty.new_empty(self._indices.shape)
            self.refresh_masters()

    def _follow_device(self) -> None:
        devices = {parameter.device for parameter in self.parameters.values()}
        if len(devices) > 1:
            raise UsageError(
                f"the weights were moved to several devices ({', '.join(sorted(map(str, devices)))}) after the "
                "optimizer was built; build the SparseOptimizer when they are where they will train"
            )
        [device] = devices
        if device != self._indices.device:
            self._plain_indices = None
            self._indices, self._empty = self._indices.to(device), self._empty.to(device)
            self._arrays = {kind: array.to(device) for kind, array in self._arrays.items()}
            self._cohorts.move_to(device)
            self._gradients = None if self._gradients is None else self._gradients.to(device)

    def refresh_masters(self) -> None:
        """Set master weights to the weights."""
        if MASTER in self._arrays:
            for name in self.names:
                weights = self._flat(name)[self.indices(name)].to(self._empty.dtype)
                self._arrays[MASTER][self._segments.slice_of(name)] = weights

    def _update_run(self, names: Sequence[str], group: Group) -> None:
        """Gather the entries of neighbouring tensors, update them, and write the weights back."""
        positions = range(self._segments.position[names[0]], self._segments.position[names[-1]] + 1)
        for position in positions:
            self._cohorts.num_updates[position] += 1
        part = self._segments.slice_of(*names)
        if part.start == part.stop:
            return
        assert self._gradients is not None
        flats = [self._flat(name) for name in names]
        places = self._segments.split(self._plain()[part], names)
        gathered = torch.cat([flat.index_select(0, some) for flat, some in zip(flats, places, strict=True)])
        weights = self._arrays[MASTER][part] if MASTER in self._arrays else gathered.to(self._empty.dtype)
        if MASTER in self._arrays and not agrees(gathered, weights):
            take_over(gathered, weights)
            self.refreshed += names
        state = {kind: self._arrays[kind][part] for kind in self._rule.state_names}
        ages = self._cohorts.ages(positions, self._indices[part])
        self._rule.update_entries(weights, self._gradients[part], state, ages, group)
        for flat, some, moved in zip(
            flats, places, self._segments.split(weights.to(flats[0].dtype), names), strict=True
        ):
            flat.index_copy_(0, some.long(), moved)

    def _runs(self) -> Iterator[list[str]]:
        """Yield names of tensors that had a gradient, neighbours together until they hold `RUN` entries."""
        run: list[str] = []
        num_entries = 0
        for name in self.names:
            if name in self._was_read:
                run.append(name)
                num_entries += self.num_entries(name)
            if run and (name not in self._was_read or num_entries >= RUN):
                yield run
                run, num_entries = [], 0
        if run:
            yield run

    # Layout -------------------------------------------------------------------------------------------------------

    def _flat(self, name: str) -> Tensor:
        # Looked up at every use: a wrapper may move a shard to other memory.
        return local_part(self.parameters[name]).detach().view(-1)

    def _plain(self) -> Tensor:
        """Return all indices without flags, cached until the set or the step changes."""
        if self._plain_indices is None:
            self._plain_indices = self._cohorts.plain(self._indices)
        return self._plain_indices

    def _joined_at(self, name: str) -> Tensor:
        part = self._segments.slice_of(name)
        return self._cohorts.joined_at(self._segments.position[name], self._indices[part])

    def _rewrite_cohorts(self, name: str, joined_at: Tensor) -> None:
        part = self._segments.slice_of(name)
        self._indices[part] = self._cohorts.rewrite(self._segments.position[name], self._indices[part], joined_at)

    def _initial(self, kind: str, name: str, indices: Tensor) -> Tensor:
        if kind == MASTER:
            return self._flat(name)[indices]
        return torch.zeros(indices.numel(), dtype=self._arrays[kind].dtype, device=indices.device)
