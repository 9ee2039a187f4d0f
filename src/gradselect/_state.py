"""The state of every block: made when first needed, where the residency wants it, counted to the byte."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ._distributed import held, share, spread
from ._groups import ParameterTable
from ._observe import dense
from ._residency import AbstractResidency
from ._rules import AbstractRule, State

MASTER = "master"


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
    """

    def __init__(
        self,
        store: MutableMapping[Tensor, State],
        table: ParameterTable,
        *,
        rule: AbstractRule,
        residency: AbstractResidency,
        master_dtype: torch.dtype | None,
    ) -> None:
        self._store = store
        self._table = table
        self._rule = rule
        self._residency = residency
        self._master_dtype = master_dtype
        self.resident: set[str] = set()
        self.moved_bytes = 0

    def admit(self, names: Sequence[str]) -> None:
        """State of these blocks, and of no other if the residency frees, is on the device."""
        self.evict_all_but(names)
        for name in names:
            if name not in self.resident:
                self.resident.add(name)
                for parameter, state in self._existing(name):
                    self._residency.admit(state, self._large(state), parameter.device)
                self.moved_bytes += self.num_bytes(name) if self._residency.frees_device else 0

    def evict_all_but(self, names: Collection[str]) -> None:
        """These blocks' state may stay on the device; all other state leaves it if the residency frees."""
        if not self._residency.frees_device:
            return
        for name in self.resident - set(names):
            for parameter, state in self._existing(name):
                self._residency.evict(state, self._large(state))
                if not state:
                    del self._store[parameter]
            # Dropped state is no longer there to be counted: it has not moved.
            self.moved_bytes += self.num_bytes(name)
            self.resident.discard(name)

    def of(self, parameter: Parameter) -> State:
        """The parameter's state, made at its first update."""
        if parameter not in self._store:
            self._store[parameter] = self._make(parameter)
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
        targets = [held(parameter) for parameter, _ in moving]
        weights = [state.get(MASTER, target) for state, target in zip(states, targets, strict=True)]
        grads = [dense(held(grad)).to(weight.dtype) for weight, (_, grad) in zip(weights, moving, strict=True)]
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
        for parameter, state in self._store.items():
            if MASTER in state:
                state[MASTER].copy_(held(parameter))

    def spread(self, states: Mapping[int, State]) -> dict[int, State]:
        """States by the number of the parameter, for a checkpoint: sharded as their weight is."""
        parameters = self._table.all()
        return {
            number: {
                key: spread(value, like=parameters[number]) if key in self._large(state) else value
                for key, value in state.items()
            }
            for number, state in states.items()
        }

    def load(self, saved: Mapping[str, State], *, resident: Collection[str]) -> None:
        """Take copies of the saved states, by parameter name, to where they were.

        One block at a time: the device never holds more than it did in the run that saved them. Not torch's own
        placement, which would cast fp32 state of a bf16 weight to bf16.
        """
        self._store.clear()
        self.resident = set()
        for block, names in self._table.members.items():
            for name, parameter in zip(names, self._table.of(block), strict=True):
                if saved[name]:
                    self._store[parameter] = self._placed(saved[name], parameter)
            self.resident.add(block)
            if block not in resident:
                self.evict_all_but(self.resident - {block})
        self.moved_bytes = 0

    def _placed(self, state: State, parameter: Parameter) -> State:
        large = self._large(state)
        counter_device = self._rule.counter_device(parameter)
        return {
            key: share(value, like=parameter).to(parameter.device if key in large else counter_device, copy=True)
            for key, value in state.items()
        }

    def _make(self, parameter: Parameter) -> State:
        weight = held(parameter)
        if self._master_dtype is None or weight.dtype not in (torch.bfloat16, torch.float16):
            return self._rule.make_state(weight)
        master = weight.detach().to(self._master_dtype, copy=True)
        return {MASTER: master, **self._rule.make_state(master)}

    def _existing(self, name: str) -> list[tuple[Parameter, State]]:
        return [(parameter, self._store[parameter]) for parameter in self._table.of(name) if parameter in self._store]

    def _large(self, state: State) -> list[str]:
        return [name for name in (*self._rule.state_names, MASTER) if name in state]


def num_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that this process holds."""
    return held(tensor).numel() * tensor.element_size()
