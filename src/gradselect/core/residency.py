"""Where a block's state lives while the block is not selected: kept on the device, offloaded to the host, dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradselect.usage import UsageError

from .rules import State
from .transfer import Transfer, open_lanes


@dataclass(frozen=True, kw_only=True)
class StateCopy:
    """The states of one block, which move together.

    Args:
        states: of each parameter, with the names of its large entries (moments and the master weight); counters are
            never moved.
        num_bytes: of the large entries.
    """

    states: Sequence[tuple[State, Sequence[str]]]
    num_bytes: int


class AbstractMover(ABC):
    """Moves states during one run. What does not move has nothing to do but in `switch`."""

    @abstractmethod
    def switch(self, leaving: Sequence[StateCopy], coming: Sequence[StateCopy], *, held_bytes: int) -> None:
        """The update is over, and the next selection is known. `held_bytes` are on the device now."""

    def adopt(self, state: State, names: Sequence[str]) -> None:
        """A state has been made on the device."""

    def settle(self) -> None:
        """What came is about to be used on the device."""

    def wait(self) -> None:
        """What left is about to be read on the host."""

    def forget(self) -> None:
        """All states are gone, but others may still read what they were."""


class AbstractResidency(ABC):
    """Where state of unselected blocks lives: the user's choice. `open` makes what moves the states of a run.

    Example:
        >>> [kind().frees_device for kind in (Keep, Offload, Drop)]
        [False, True, True]
    """

    frees_device: bool
    """Whether state of a block that is not selected leaves the device."""

    max_device_bytes: int | None = None
    """Most bytes of moments and masters on the device; None: no limit."""

    @abstractmethod
    def open(self, device: torch.device) -> AbstractMover:
        """For states of weights on `device`."""


@dataclass(frozen=True)
class Keep(AbstractResidency):
    """State stays on the device once it exists. Memory grows to AdamW's as more blocks have had a turn.

    Example:
        >>> import gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> optimizer = gs.BlockOptimizer(model, gs.Uniform(count=1), lr=1e-3, residency=Keep())
        >>> optimizer.memory()["state_on_host"]
        0
    """

    frees_device = False

    def open(self, device: torch.device) -> AbstractMover:
        return _Keeping()


@dataclass(frozen=True)
class Drop(AbstractResidency):
    """State is forgotten when its block is no longer selected; moments, step count and master weights start anew.

    Least memory on host and device. A master weight's digits below the model's precision are lost at each switch.

    Example:
        >>> import gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> optimizer = gs.BlockOptimizer(model, gs.Cyclic(every=50), lr=1e-3, residency=Drop())
        >>> optimizer.memory()["state_on_host"]
        0
    """

    frees_device = True

    def open(self, device: torch.device) -> AbstractMover:
        return _Dropping()


@dataclass(frozen=True, kw_only=True)
class Offload(AbstractResidency):
    """State of unselected blocks lives in host memory and comes back unchanged: nothing is lost.

    On a CUDA device the copies run on two streams of their own, out and back at the same time, from and to page-locked
    memory. They start at the end of an update, when the next selection is known, and run beside the forward and the
    backward pass; the next update waits for them on the device, the host never does. In a step that looks at all
    gradients the selection is known too late for that, and the update waits. State that is selected again stays. What
    comes takes the memory of what leaves, so the device holds no more than the larger of the two selections. Other
    accelerators copy at once. On a CPU model host and device are the same memory: nothing is copied, and bytes are
    reported as on an accelerator.

    While copies run, tensors in `optimizer.state` hold undefined values; read them through `optimizer.state_dict()`.

    Args:
        max_device_bytes: most bytes of moments and master weights on the device, those on their way included. What
            comes waits for what leaves as long as that takes. Default None: as many as the larger selection has.
        max_pinned_bytes: most bytes of host memory to page-lock; torch rounds each tensor up to a power of two. Beyond
            it, and where the system refuses, memory is pageable, and training waits for its copies; a warning is
            logged once. 0: never page-lock. Default None: no limit.

    Raises:
        UsageError: a number below its range; within a step: a selection whose state exceeds `max_device_bytes`.

    Example:
        >>> import gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> optimizer = gs.BlockOptimizer(model, gs.AdaGradSelect(explore_steps=100), lr=1e-3, residency=Offload())
        >>> optimizer.memory()["state_on_host"]
        0
    """

    max_device_bytes: int | None = None
    max_pinned_bytes: int | None = None
    frees_device = True

    def __post_init__(self) -> None:
        for name, least in (("max_device_bytes", 1), ("max_pinned_bytes", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise UsageError(f"{name}={value!r} must be a whole number >= {least}, of bytes; None: no limit")

    def open(self, device: torch.device) -> AbstractMover:
        transfer = Transfer(open_lanes(device), max_pinned_bytes=self.max_pinned_bytes)
        return _Offloading(transfer, max_device_bytes=self.max_device_bytes)


class _Keeping(AbstractMover):
    def switch(self, leaving: Sequence[StateCopy], coming: Sequence[StateCopy], *, held_bytes: int) -> None:
        pass


class _Dropping(AbstractMover):
    def switch(self, leaving: Sequence[StateCopy], coming: Sequence[StateCopy], *, held_bytes: int) -> None:
        for parcel in leaving:
            for state, _ in parcel.states:
                state.clear()


class _Offloading(AbstractMover):
    def __init__(self, transfer: Transfer, *, max_device_bytes: int | None) -> None:
        self._transfer = transfer
        self._max_device_bytes = max_device_bytes

    def switch(self, leaving: Sequence[StateCopy], coming: Sequence[StateCopy], *, held_bytes: int) -> None:
        """One block out, one back, by turns: both ways are busy, and the device holds no more than it has to."""
        limit = self._max_device_bytes
        if limit is None:
            limit = max(held_bytes, held_bytes - _sum(leaving) + _sum(coming))
        waiting = deque(leaving)
        self._transfer.begin()
        for parcel in coming:
            while waiting and held_bytes + parcel.num_bytes > limit:
                held_bytes -= waiting[0].num_bytes
                self._send(waiting.popleft())
            held_bytes += parcel.num_bytes
            for state, names in parcel.states:
                self._transfer.fetch(state, names)
        for parcel in waiting:
            self._send(parcel)

    def _send(self, parcel: StateCopy) -> None:
        for state, names in parcel.states:
            self._transfer.send(state, names)

    def adopt(self, state: State, names: Sequence[str]) -> None:
        self._transfer.adopt(state, names)

    def settle(self) -> None:
        self._transfer.settle()

    def wait(self) -> None:
        self._transfer.wait()

    def forget(self) -> None:
        self._transfer.forget()


def _sum(parcels: Sequence[StateCopy]) -> int:
    return sum(parcel.num_bytes for parcel in parcels)
