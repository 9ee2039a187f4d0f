"""The state of every block: made when first needed, where the residency wants it, counted to the byte."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradselect.parallel import as_dtensor, local_part, local_part_like
from gradselect.usage import UsageError

from .gradients import dense
from .parameter_groups import ParameterTable
from .phases import STATE, Phases, in_phase
from .residency import AbstractMover, AbstractResidency, StateCopy
from .rules import AbstractRule, State

MASTER = "master"

HALF = (torch.bfloat16, torch.float16)
"""Types of weights that may have a master."""


class StateStore(defaultdict[Tensor, State]):
    """`StateStore(dict)`: state by parameter, as torch's optimizers hold it, but never false.

    `torch.distributed.checkpoint.state_dict` takes a step of its own on an optimizer whose state is false.
    """

    def __bool__(self) -> bool:
        return True


class BlockStates:
    """State of the parameters of each block, kept in the optimizer's own `state`: of what this process holds of them.

    A parameter has a state from its first update on. Its large entries (moments, and the master weight of a
    half-precision parameter) are on the device while the block is resident.

    Args:
        store: the optimizer's `state`, by parameter.
        table: finds the parameters of each block.
        rule: makes the state.
        residency: where the state of unselected blocks lives.
        master_dtype: dtype of masters and moments of bf16 and fp16 parameters; None: no masters.
        phases: of the optimizer.
    """

    def __init__(
        self,
        store: MutableMapping[Tensor, State],
        table: ParameterTable,
        *,
        rule: AbstractRule,
        residency: AbstractResidency,
        master_dtype: torch.dtype | None,
        phases: Phases | None = None,
    ) -> None:
        self._phases = phases or Phases()
        self._store = store
        self._table = table
        self._rule = rule
        self._residency = residency
        self._master_dtype = master_dtype
        self._open: tuple[torch.device, AbstractMover] | None = None
        self.resident: set[str] = set()
        self.moved_bytes = 0

    def admit(self, names: Collection[str]) -> None:
        """State of these blocks, and of no other if the residency frees, is on the device and may be used."""
        self.prefetch(names)
        self._mover.settle()

    @in_phase(STATE)
    def prefetch(self, names: Collection[str]) -> None:
        """These blocks are the next selection: their state comes, other state leaves if the residency frees.

        What moves may be under way until `admit`.

        Raises:
            UsageError: the selection's state exceeds what the residency may hold on the device.
        """
        self._check_fits(names)
        staying = names if self._residency.frees_device else self._table.blocks
        leaving = [name for name in self._table.blocks if name in self.resident and name not in staying]
        coming = [name for name in self._table.blocks if name in names and name not in self.resident]
        parcels = [[self._parcel(name) for name in some if self._existing(name)] for some in (leaving, coming)]
        if any(parcels):
            self._mover.switch(*parcels, held_bytes=sum(map(self.num_bytes, self.resident)))
        self.resident = self.resident.difference(leaving).union(coming)
        for name in leaving:
            for parameter, state in self._existing(name):
                if not state:
                    del self._store[parameter]
        if self._residency.frees_device:
            # Dropped state is no longer there to be counted: it has not moved.
            self.moved_bytes += sum(map(self.num_bytes, (*leaving, *coming)))

    def wait(self) -> None:
        """All state may be read, wherever it is."""
        self._mover.wait()

    def of(self, parameter: Parameter) -> State:
        """The parameter's state, made at its first update."""
        # Reading optimizer.state[parameter], as loops that log do, leaves an empty one.
        if not self._store.get(parameter):
            self._store[parameter] = state = self._make(local_part(parameter))
            self._mover.adopt(state, self._large(state))
        return self._store[parameter]

    def update(self, parameters: Sequence[Parameter], group: Mapping[str, Any]) -> None:
        """One call of the rule for parameters of one group; masters stand in for half-precision weights.

        A parameter without a gradient is left alone.

        Raises:
            UsageError: a gradient is sparse.
        """
        moving = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        if not moving:
            return
        states = [self.of(parameter) for parameter, _ in moving]
        targets = [local_part(parameter) for parameter, _ in moving]
        weights = [state.get(MASTER, target) for state, target in zip(states, targets, strict=True)]
        grads = [dense(local_part(grad)).to(weight.dtype) for weight, (_, grad) in zip(weights, moving, strict=True)]
        self._rule.update(weights, grads, states, group)
        for weight, target in zip(weights, targets, strict=True):
            if weight is not target:
                target.copy_(weight)

    def num_bytes(self, name: str) -> int:
        """Bytes of the block's moments and masters, wherever they are."""
        return sum(num_bytes(state[entry]) for _, state in self._existing(name) for entry in self._large(state))

    def memory(self) -> tuple[int, int, int]:
        """Bytes now: masters on the device, moments on the device, both on the host."""
        masters = [s[MASTER] for name in self.resident for _, s in self._existing(name) if MASTER in s]
        master_bytes = sum(num_bytes(master) for master in masters)
        device_bytes = sum(self.num_bytes(name) for name in self.resident)
        host_bytes = sum(self.num_bytes(name) for name in self._table.blocks if name not in self.resident)
        return master_bytes, device_bytes - master_bytes, host_bytes

    def refresh_masters(self) -> None:
        """Master weights are the weights as they are now."""
        self.wait()
        for parameter, state in self._store.items():
            if MASTER in state:
                state[MASTER].copy_(local_part(parameter))

    def as_dtensors(self, states: Mapping[int, State]) -> dict[int, State]:
        """States by the number of the parameter, for a checkpoint: sharded as their weight is."""
        parameters = self._table.all()
        return {
            number: {
                key: as_dtensor(value, like=parameters[number]) if key in self._large(state) else value
                for key, value in state.items()
            }
            for number, state in states.items()
        }

    def filled(self, states: Mapping[int, State], *, is_to_load: bool) -> dict[int, State]:
        """`states`, and one of zeros for every parameter that has none.

        Args:
            states: by the number of the parameter, as `as_dtensors` returns them.
            is_to_load: whether the zeros will be written to; else they take no memory.
        """
        missing = {
            number: self._zeros(parameter, is_to_load=is_to_load)
            for number, parameter in enumerate(self._table.all())
            if not states.get(number)
        }
        return {**states, **self.as_dtensors(missing)}

    def load(self, saved: Mapping[str, State], *, resident: Collection[str]) -> None:
        """Take copies of the saved states, by parameter name, to where they were.

        One block at a time, first those that leave the device: it never holds more than it did in the run that saved
        them. Not torch's own placement, which would cast fp32 state of a bf16 weight to bf16.

        Raises:
            UsageError: it has master weights of another dtype, or none where this run has some.
        """
        for name, parameter in self._table.named():
            self._check_master(name, saved[name], parameter)
        self._mover.forget()
        self._store.clear()
        self.resident = set()
        for block in sorted(self._table.blocks, key=lambda block: block in resident):
            for name, parameter in zip(self._table.members[block], self._table.of(block), strict=True):
                if saved[name]:
                    self._store[parameter] = state = self._placed(saved[name], parameter)
                    self._mover.adopt(state, self._large(state))
            if block in resident or self._existing(block):
                self.resident.add(block)
            if block not in resident:
                self.prefetch(self.resident - {block})
        self.moved_bytes = 0

    def _check_master(self, name: str, state: State, parameter: Parameter) -> None:
        if not state or parameter.dtype not in HALF:
            return
        theirs = state[MASTER].dtype if MASTER in state else None
        if theirs != self._master_dtype:
            raise UsageError(
                f"the checkpoint was written with master_dtype={theirs} and this run has master_dtype="
                f"{self._master_dtype} ({name!r} is {parameter.dtype}); write master_dtype={theirs}"
            )

    def _placed(self, state: State, parameter: Parameter) -> State:
        large = self._large(state)
        counter_device = self._rule.counter_device(parameter)
        return {
            key: local_part_like(value, like=parameter).to(
                parameter.device if key in large else counter_device, copy=True
            )
            for key, value in state.items()
        }

    def _zeros(self, parameter: Parameter, *, is_to_load: bool) -> State:
        """What the parameter's state would be, of zeros."""
        state = self._make(local_part(parameter).to("meta"))
        for key, value in state.items():
            is_large = key in self._large(state)
            device = parameter.device if is_large else self._rule.counter_device(parameter)
            zeros = torch.zeros((), dtype=value.dtype, device=device).expand(value.shape)
            state[key] = zeros.contiguous() if is_to_load or not is_large else zeros
        return state

    def _make(self, weight: Tensor) -> State:
        if self._master_dtype is None or weight.dtype not in HALF:
            return self._rule.make_state(weight)
        master = weight.detach().to(self._master_dtype, copy=True)
        return {MASTER: master, **self._rule.make_state(master)}

    @property
    def _mover(self) -> AbstractMover:
        """Opened late: until the first update the model may go to another device, and its parameters be replaced.

        Later it may go too, to be saved say, and come back: states stay where they are.
        """
        device = self._table.all()[0].device
        if self._open is None or (self._open[0] != device and not any(self._store.values())):
            self._open = device, self._residency.open(device)
        return self._open[1]

    def _check_fits(self, names: Collection[str]) -> None:
        limit = self._residency.max_device_bytes
        if limit is None:
            return
        needed = sum(self._needed_bytes(parameter) for name in names for parameter in self._table.of(name))
        if needed > limit:
            raise UsageError(
                f"the state of {', '.join(names)} takes {needed} bytes on the device, and max_device_bytes={limit}; "
                f"write max_device_bytes={needed} or more, or let the policy choose less"
            )

    def _needed_bytes(self, parameter: Parameter) -> int:
        state = self._store.get(parameter) or self._make(local_part(parameter).to("meta"))
        return sum(num_bytes(state[name]) for name in self._large(state))

    def _parcel(self, name: str) -> StateCopy:
        states = [(state, self._large(state)) for _, state in self._existing(name)]
        return StateCopy(states=states, num_bytes=self.num_bytes(name))

    def _existing(self, name: str) -> list[tuple[Parameter, State]]:
        return [(parameter, self._store[parameter]) for parameter in self._table.of(name) if parameter in self._store]

    def _large(self, state: State) -> list[str]:
        return [name for name in (*self._rule.state_names, MASTER) if name in state]


def num_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that this process holds."""
    return local_part(tensor).numel() * tensor.element_size()
