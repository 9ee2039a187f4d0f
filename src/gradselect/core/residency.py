"""Residency of the state of unselected blocks: kept on the device, offloaded to the host, or dropped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradselect.usage import UsageError

from .devices import is_accelerator
from .rules import State
from .transfer import Transfer, open_streams


@dataclass(kw_only=True)
class StateCopy:
    """State of one block, which moves as a whole.

    Args:
        block: its name.
        states: state of each parameter, with the names of its large tensors (moments, master); counters never move.
        num_bytes: bytes of the large tensors.
        has_moved: True once a switch has moved it, also a switch that an error ends later.
    """

    block: str
    states: Sequence[tuple[State, Sequence[str]]]
    num_bytes: int
    has_moved: bool = False


class AbstractMover(ABC):
    """Moves states during one run. Without copies only `switch` has work to do."""

    @abstractmethod
    def switch(self, leaving: Sequence[StateCopy], coming: Sequence[StateCopy], *, held_bytes: int) -> None:
        """Exchange states after an update, for the next selection. The device holds `held_bytes` now."""

    def adopt(self, state: State, names: Sequence[str]) -> None:
        """Take over a state that was made on the device."""

    def settle(self) -> None:
        """Make the device wait for the states that are coming, before it uses them."""

    def wait(self) -> None:
        """Make the host wait for the states that are leaving, before it reads them."""

    def forget(self) -> None:
        """Forget all states; somebody else may still read their tensors."""


class AbstractResidency(ABC):
    """Place of the state of unselected blocks, as the user sets it. `open` makes the mover of a run.

    Example:
        >>> [kind().frees_device for kind in (Keep, Offload, Drop)]
        [False, True, True]
    """

    frees_device: bool
    """True if the state of an unselected block leaves the device."""

    max_device_bytes: int | None = None
    """Limit for bytes of moments and masters on the device; None: no limit."""

    @abstractmethod
    def open(self, device: torch.device) -> AbstractMover:
        """Return the mover for states of weights on `device`."""


@dataclass(frozen=True)
class Keep(AbstractResidency):
    """Keeps state on the device. Memory grows to AdamW's as more blocks have been selected.

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
    """Drops the state of a block that is no longer selected; moments, step count and masters start again.

    Uses the least memory on host and device. Digits of masters below the model's precision are lost at each switch.

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
    """Keeps the state of unselected blocks in host memory and brings it back unchanged.

    On a CUDA device the copies run in both directions at once, on two streams of their own, from and to page-locked
    memory. They start at the end of an update, when the next selection is known, and run beside forward and backward
    pass. The next update waits for them on the device; the host does not, except where weights in half precision are
    compared with their masters, before each update. An explore step knows its selection too late for that, so its
    update waits. State that is selected again stays. Incoming state takes the memory of outgoing state, so the device
    holds at most the larger of the two selections. Other accelerators copy at once. For a model on the CPU nothing is
    copied, and bytes are reported as on an accelerator.

    While copies run, tensors in `optimizer.state` hold undefined values; read them through `optimizer.state_dict()`.

    Args:
        max_device_bytes: limit for bytes of moments and masters on the device, those being copied included. Incoming
            state waits for outgoing state to stay below it. Default None: the bytes of the larger selection.
        max_pinned_bytes: limit for page-locked host memory; torch rounds each tensor up to a power of two. Beyond it,
            or where the system refuses, memory is pageable, training waits for its copies, and a warning is logged
            once. 0: never page-lock. Default None: no limit.

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
        transfer = Transfer(open_streams(device), max_pinned_bytes=self.max_pinned_bytes)
        return _Offloading(transfer, max_device_bytes=self.max_device_bytes)


def default_residency(device: torch.device) -> AbstractResidency:
    """Return the residency where none is given: `Offload()` on an accelerator, as in AdaGradSelect, else `Keep()`.

    Example:
        >>> default_residency(torch.device("cpu"))
        Keep()

    Reference:
        Kumar, Gupta, Chawla: AdaGradSelect, arXiv 2512.15764, section on optimizer state management.
    """
    return Offload() if is_accelerator(device) else Keep()


class _Keeping(AbstractMover):
    def switch(self, leaving: Sequence[StateCopy], coming: Sequence[StateCopy], *, held_bytes: int) -> None:
        pass


class _Dropping(AbstractMover):
    def switch(self, leaving: Sequence[StateCopy], coming: Sequence[StateCopy], *, held_bytes: int) -> None:
        for copy in leaving:
            for state, _ in copy.states:
                state.clear()


class _Offloading(AbstractMover):
    def __init__(self, transfer: Transfer, *, max_device_bytes: int | None) -> None:
        self._transfer = transfer
        self._max_device_bytes = max_device_bytes

    def switch(self, leaving: Sequence[StateCopy], coming: Sequence[StateCopy], *, held_bytes: int) -> None:
        """Alternate outgoing and incoming blocks, so that both directions are busy and the device holds little."""
        limit = self._max_device_bytes
        if limit is None:
            limit = max(held_bytes, held_bytes - _sum(leaving) + _sum(coming))
        waiting = deque(leaving)
        self._transfer.begin()
        for copy in coming:
            while waiting and held_bytes + copy.num_bytes > limit:
                held_bytes -= waiting[0].num_bytes
                self._send(waiting.popleft())
            held_bytes += copy.num_bytes
            self._transfer.fetch(copy.states)
            copy.has_moved = True
        for copy in waiting:
            self._send(copy)

    def _send(self, copy: StateCopy) -> None:
        self._transfer.send(copy.states)
        copy.has_moved = True

    def adopt(self, state: State, names: Sequence[str]) -> None:
        self._transfer.adopt(state, names)

    def settle(self) -> None:
        self._transfer.settle()

    def wait(self) -> None:
        self._transfer.wait()

    def forget(self) -> None:
        self._transfer.forget()


def _sum(copies: Sequence[StateCopy]) -> int:
    return sum(copy.num_bytes for copy in copies)
