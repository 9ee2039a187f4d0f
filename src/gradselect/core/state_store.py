"""Mapping that an optimizer keeps its state in, which helpers of torch.distributed.checkpoint look at."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

from gradselect.parallel import is_running

from .rules import State


class StateStore(defaultdict[Tensor, State]):
    """State by parameter, as in torch's optimizers; make it with `StateStore(dict)`.

    `torch.distributed.checkpoint.state_dict` and torchtitan step an optimizer whose state is false, to learn which
    tensors to load. Once it has taken steps under torch.distributed it is true even when empty: what they save is then
    the state_dict alone, which on shards has zeros that take no memory.

    Attributes:
        has_begun: True once the optimizer has taken a step.
    """

    has_begun = False

    def __bool__(self) -> bool:
        return len(self) > 0 or (self.has_begun and is_running())
