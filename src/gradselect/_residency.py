"""Where a block's state lives while the block is not selected: kept on the device, offloaded to the host, dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._rules import State


class AbstractResidency(ABC):
    """Moves one parameter's state when its block is selected and when it no longer is.

    `names` are the large entries of the state (moments and master weights); counters are never moved.
    """

    frees_device: bool
    """Whether `evict` takes the state off the device."""

    @abstractmethod
    def admit(self, state: State, names: Sequence[str], device: torch.device) -> None:
        """The block is selected: bring the state that exists onto `device`."""

    @abstractmethod
    def evict(self, state: State, names: Sequence[str]) -> None:
        """The block is no longer selected."""


@dataclass(frozen=True)
class Keep(AbstractResidency):
    """State stays on the device once it exists. Memory grows to AdamW's as more blocks have had a turn."""

    frees_device = False

    def admit(self, state: State, names: Sequence[str], device: torch.device) -> None:
        pass

    def evict(self, state: State, names: Sequence[str]) -> None:
        pass


@dataclass(frozen=True)
class Offload(AbstractResidency):
    """State of unselected blocks lives in host memory and comes back unchanged: nothing is lost.

    On an accelerator the copies run from and to page-locked memory in the order of the current stream. On a CPU model
    host and device are the same memory: nothing is copied, and bytes are reported as on an accelerator.
    """

    frees_device = True

    def admit(self, state: State, names: Sequence[str], device: torch.device) -> None:
        for name in names:
            state[name] = state[name].to(device, non_blocking=True)

    def evict(self, state: State, names: Sequence[str]) -> None:
        for name in names:
            state[name] = _to_host(state[name])


@dataclass(frozen=True)
class Drop(AbstractResidency):
    """State is forgotten when its block is no longer selected; moments, step count and master weights start anew.

    Least memory on host and device. A master weight's digits below the model's precision are lost at each switch.
    """

    frees_device = True

    def admit(self, state: State, names: Sequence[str], device: torch.device) -> None:
        pass

    def evict(self, state: State, names: Sequence[str]) -> None:
        state.clear()


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
    # Stream order protects the source: what reuses its memory on this stream runs after the copy.
    return host.copy_(tensor, non_blocking=True)
