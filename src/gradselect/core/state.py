"""State of all blocks: made when first needed, placed by the residency, counted exactly."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import Parameter

from gradselect.parallel import local_part
from gradselect.usage import UsageError

from .block import num_bytes
from .masters import HALF, MASTER, check_master, unrounded
from .parameter_groups import ParameterTable
from .phases import STATE, Phases, in_phase
from .residency import AbstractMover, AbstractResidency, StateCopy, default_residency
from .rules import State
from .settings import UpdateSettings
from .state_form import StateForm


class BlockStates:
    """State of each block's parameters, for their local parts; the optimizer's `state` holds it.

    A parameter has state from its first update on. Its large tensors (moments, and the master of a half-precision
    parameter) are on the device while the block is resident.

    Attributes:
        resident: blocks whose state is on the device.
        moved_bytes: bytes that moved between device and host since the last step.

    Args:
        store: the optimizer's `state`, by parameter.
        table: finds the parameters of each block.
        update: its rule makes the state, its residency places it; with its `master_dtype` bf16 and fp16 parameters have
            masters and state of that dtype.
        phases: of the optimizer.
    """

    def __init__(
        self,
        store: MutableMapping[Tensor, State],
        table: ParameterTable,
        update: UpdateSettings,
        *,
        phases: Phases,
    ) -> None:
        self._phases = phases
        self._store = store
        self._table = table
        self._form = StateForm(update.rule, master_dtype=update.master_dtype)
        self._given = update.residency
        self._open: tuple[torch.device, AbstractResidency, AbstractMover] | None = None
        self._shown: set[Tensor] = set()
        self.resident: set[str] = set()
        self.moved_bytes = 0

    def admit(self, names: Collection[str]) -> None:
        """Make the state of these blocks ready on the device; if the residency frees, no other state stays there."""
        self.prefetch(names)
        self._mover.settle()

    @in_phase(STATE)
    def prefetch(self, names: Collection[str]) -> None:
        """Start to move the state of the next selection in, and other state out if the residency frees.

        Copies may run until `admit`.

        Raises:
            UsageError: the state of the selection exceeds the residency's `max_device_bytes`.
        """
        self._check_fits(names)
        staying = names if self.residency.frees_device else self._table.blocks
        leaving = [name for name in self._table.blocks if name in self.resident and name not in staying]
        coming = [name for name in self._table.blocks if name in names and name not in self.resident]
        copies = [[self._copy_of(name) for name in blocks if self._existing(name)] for blocks in (leaving, coming)]
        if any(copies):
            self._switch(*copies)
        self.resident = self.resident.difference(leaving).union(coming)
        for name in leaving:
            for parameter, state in self._existing(name):
                if not state:
                    del self._store[parameter]
        if self.residency.frees_device:
            # Dropped state no longer exists, so it counts as not moved.
            self.moved_bytes += sum(map(self.num_bytes, (*leaving, *coming)))

    def _switch(self, leaving: Sequence[StateCopy], coming: Sequence[StateCopy]) -> None:
        """Let the mover exchange states. If it fails, e.g. without memory, note where each block is."""
        try:
            self._mover.switch(leaving, coming, held_bytes=sum(map(self.num_bytes, self.resident)))
        except BaseException:
            moved = [copy for copy in (*leaving, *coming) if copy.has_moved]
            self.resident ^= {copy.block for copy in moved}
            self.moved_bytes += sum(copy.num_bytes for copy in moved)
            raise

    def masters(self) -> dict[Tensor, Tensor]:
        """Return the masters that exist, wherever they are, by parameter."""
        held = {parameter: state for parameter, state in self._store.items() if parameter not in self._shown}
        return {parameter: state[MASTER] for parameter, state in held.items() if MASTER in state}

    def masters_of(self, names: Collection[str]) -> dict[Parameter, Tensor]:
        """Return the masters of half-precision weights of resident blocks, by parameter.

        A weight that was cast to half precision after its first update gets its master now; one that was cast from it,
        or whose state comes from such a model, loses it.
        """
        masters = {}
        for name in names:
            for parameter, state in self._existing(name):
                if MASTER in state and parameter.dtype not in HALF:
                    unrounded(local_part(parameter), state.pop(MASTER))
                if self._form.master_dtype is None:
                    continue
                if state and MASTER not in state and parameter.dtype in HALF:
                    made = {MASTER: self._form.master_of(local_part(parameter))}
                    self._mover.adopt(made, [MASTER])
                    state.update(made)
                if MASTER in state and parameter.dtype in HALF:
                    masters[parameter] = state[MASTER]
        return masters

    def wait(self) -> None:
        """Wait until all state may be read, wherever it is."""
        self._mover.wait()

    def of(self, parameter: Parameter) -> State:
        """State of the parameter, made at its first update."""
        # Reading optimizer.state[parameter], as a logging loop may, leaves an empty state.
        if not self.exists(parameter):
            self._shown.discard(parameter)
            made = self._form.make(local_part(parameter))
            self._mover.adopt(made, self._form.large(made))  # may fail without memory: then there is no state
            self._store[parameter] = made
        state = self._store[parameter]
        self._form.check_own(state)
        return state

    def exists(self, parameter: Tensor) -> bool:
        """Return True if the parameter has state."""
        return bool(self._store.get(parameter)) and parameter not in self._shown

    def show(self, others: Mapping[Parameter, State] = MappingProxyType({}), *, is_to_load: bool) -> None:
        """Put `others`, or zeros, where no state exists: a loader reads the keys. Nothing else takes them for state.

        If nothing is to write the zeros (`is_to_load`), they take no memory.
        """
        for parameter in self._table.all():
            if not self.exists(parameter):
                self._store[parameter] = others.get(parameter) or self._form.zeros(parameter, is_to_load=is_to_load)
                self._shown.add(parameter)

    def hide(self) -> None:
        """Remove what `show` put there."""
        while self._shown:
            self._store.pop(self._shown.pop(), None)

    def num_bytes(self, name: str) -> int:
        """Bytes of the block's moments and masters, on device or host."""
        return sum(self._form.num_bytes(state) for _, state in self._existing(name))

    def memory(self) -> tuple[int, int, int]:
        """Bytes held now: of masters on the device, of moments on the device, of both on the host."""
        masters = [s[MASTER] for name in self.resident for _, s in self._existing(name) if MASTER in s]
        master_bytes = sum(num_bytes(master) for master in masters)
        device_bytes = sum(self.num_bytes(name) for name in self.resident)
        host_bytes = sum(self.num_bytes(name) for name in self._table.blocks if name not in self.resident)
        return master_bytes, device_bytes - master_bytes, host_bytes

    def as_dtensors(self, states: Mapping[int, State]) -> dict[int, State]:
        """Return states for a checkpoint, by number of the parameter, sharded as their weights are."""
        parameters = self._table.all()
        return {number: self._form.as_dtensors(state, parameters[number]) for number, state in states.items()}

    def filled(self, states: Mapping[int, State], *, is_to_load: bool) -> dict[int, State]:
        """Return `states` with zeros for every parameter that has no state.

        Args:
            states: by number of the parameter, as `as_dtensors` returns them.
            is_to_load: True if the zeros will be written to; otherwise they take no memory.
        """
        missing = {
            number: self._form.zeros(parameter, is_to_load=is_to_load)
            for number, parameter in enumerate(self._table.all())
            if not states.get(number)
        }
        return {**states, **self.as_dtensors(missing)}

    def load(self, saved: Mapping[str, State], *, resident: Collection[str]) -> None:
        """Copy saved states, by parameter name, to where they were.

        One block at a time, first those that leave the device, so that it never holds more than in the saved run.
        torch's own loading would cast fp32 state of a bf16 weight to bf16.

        Raises:
            UsageError: masters are missing or have another dtype than in this run.
        """
        for name, parameter in self._table.named():
            check_master(name, saved[name], parameter, master_dtype=self._form.master_dtype)
        self._mover.forget()
        self._store.clear()
        self._shown.clear()
        self.resident = set()
        for block in sorted(self._table.blocks, key=lambda block: block in resident):
            for name, parameter in zip(self._table.members[block], self._table.of(block), strict=True):
                if saved[name]:
                    self._store[parameter] = state = self._form.placed(saved[name], parameter)
                    self._mover.adopt(state, self._form.large(state))
            if block in resident or self._existing(block):
                self.resident.add(block)
            if block not in resident:
                self.prefetch(self.resident - {block})
        self.moved_bytes = 0

    @property
    def residency(self) -> AbstractResidency:
        """The residency in use; without one given, that of the device."""
        return self._opened()[1]

    @property
    def _mover(self) -> AbstractMover:
        return self._opened()[2]

    def _opened(self) -> tuple[torch.device, AbstractResidency, AbstractMover]:
        """Device, residency and mover, opened late: before the first update the model may move to another device.

        Later it may move too, e.g. to be saved, and come back; states stay where they are.
        """
        device = self._table.all()[0].device
        if self._open is None or (self._open[0] != device and not any(map(self.exists, self._store))):
            residency = default_residency(device) if self._given is None else self._given
            self._open = device, residency, residency.open(device)
        return self._open

    def _check_fits(self, names: Collection[str]) -> None:
        limit = self.residency.max_device_bytes
        if limit is None:
            return
        needed = sum(self._needed_bytes(parameter) for name in names for parameter in self._table.of(name))
        if needed > limit:
            raise UsageError(
                f"the state of {', '.join(names)} takes {needed} bytes on the device, and max_device_bytes={limit}; "
                f"write max_device_bytes={needed} or more, or let the policy select less, and coast shorter"
            )

    def _needed_bytes(self, parameter: Parameter) -> int:
        if self.exists(parameter):
            return self._form.num_bytes(self._store[parameter])
        return self._form.num_bytes_for(parameter)

    def _copy_of(self, name: str) -> StateCopy:
        states = [(state, self._form.large(state)) for _, state in self._existing(name)]
        return StateCopy(block=name, states=states, num_bytes=self.num_bytes(name))

    def _existing(self, name: str) -> list[tuple[Parameter, State]]:
        known = [parameter for parameter in self._table.of(name) if parameter in self._store]
        return [(parameter, self._store[parameter]) for parameter in known if parameter not in self._shown]
