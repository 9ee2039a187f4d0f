"""Form of a parameter's state: which tensors it has, in which dtype, how large and on which device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from gradselect.parallel import as_dtensor, local_part, local_part_like
from gradselect.usage import UsageError

from .block import num_bytes
from .masters import HALF, MASTER
from .rules import AbstractRule, State


class StateForm:
    """Form of the state that a rule keeps, with a master beside it for a half-precision weight.

    The *large* tensors of a state are its moments and its master. The others are counters, which never move.

    Args:
        rule: makes the state of a weight.
        master_dtype: of masters of bf16 and fp16 weights, and of the state made for them; None: no masters.
    """

    def __init__(self, rule: AbstractRule, *, master_dtype: torch.dtype | None) -> None:
        self._rule = rule
        self.master_dtype = master_dtype

    def make(self, weight: Tensor) -> State:
        """Return the state of a weight before its first update, on the weight's device."""
        if self.master_dtype is None or weight.dtype not in HALF:
            return self._rule.make_state(weight)
        master = self.master_of(weight)
        return {MASTER: master, **self._rule.make_state(master)}

    def master_of(self, weight: Tensor) -> Tensor:
        """Return a new master of a weight."""
        assert self.master_dtype is not None
        return weight.detach().to(self.master_dtype, copy=True)

    def zeros(self, parameter: Parameter, *, is_to_load: bool) -> State:
        """Return a state of zeros for the parameter; they take no memory unless they are to be written to."""
        state = self.make(local_part(parameter).to("meta"))
        for key, value in state.items():
            is_large = key in self.large(state)
            device = parameter.device if is_large else self._rule.counter_device(parameter)
            zeros = torch.zeros((), dtype=value.dtype, device=device).expand(value.shape)
            state[key] = zeros.contiguous() if is_to_load or not is_large else zeros
        return state

    def placed(self, saved: State, parameter: Parameter) -> State:
        """Return a copy of a saved state, its tensors on the devices where the parameter's state has them."""
        large = self.large(saved)
        counter_device = self._rule.counter_device(parameter)
        return {
            key: local_part_like(value, like=parameter).to(
                parameter.device if key in large else counter_device, copy=True
            )
            for key, value in saved.items()
        }

    def as_dtensors(self, state: State, parameter: Parameter) -> State:
        """Return the state with large tensors sharded as the parameter is."""
        large = self.large(state)
        return {key: as_dtensor(value, like=parameter) if key in large else value for key, value in state.items()}

    def large(self, state: State) -> list[str]:
        """Return the names of the large tensors."""
        return [*self._rule.large_names(state), *([MASTER] if MASTER in state else [])]

    def num_bytes(self, state: State) -> int:
        """Bytes of the large tensors."""
        return sum(num_bytes(state[name]) for name in self.large(state))

    def num_bytes_for(self, parameter: Parameter) -> int:
        """Bytes of the large tensors of a state that does not exist yet."""
        return self.num_bytes(self.make(local_part(parameter).to("meta")))

    def check_own(self, state: State) -> None:
        """Refuse a state that the rule has not made.

        Raises:
            UsageError: says what is in it.
        """
        if self._rule.state_names and state.keys().isdisjoint(self._rule.state_names):
            raise UsageError(
                f"something else keeps {', '.join(map(repr, state))} in the optimizer's state: a wrapper such as "
                "schedule-free's averages weights that it believes to move at every step, and most blocks do not; use "
                "the optimizer without it, with a schedule of torch.optim.lr_scheduler"
            )
