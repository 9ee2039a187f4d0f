"""Copies between a device and the host that run beside the computation, and the order that keeps them right.

A device works on three *streams*, each in the order in which it is told: the computation, the way out to the host and
the way back. Streams know nothing of one another but what `after` tells them; the host waits for none. With t the
switch from one selection to the next, a -> b for "b starts when a is complete":

    compute_t -> out_t, back_t     the update is in what leaves; memory that is written to is used no more
    out of a state -> back         what comes may take its memory, and what left before is complete when it comes again
    back_t -> compute              before the next update

Every copy out is followed by a wait of the way back, so after the last line the computation is behind all of a switch:
host memory that was read may be written to by the next one.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from .rules import State

logger = logging.getLogger(__name__)


class Lane(Enum):
    """An order of work on a device."""

    COMPUTE = "compute"
    OUT = "out"
    BACK = "back"


class AbstractLanes(ABC):
    """What a device can do; `Transfer` says in which order."""

    is_apart: bool
    """Whether the device has memory of its own; if not, nothing is ever copied."""

    @abstractmethod
    def after(self, later: Lane, earlier: Lane) -> None:
        """What `later` is told from now on starts when all that `earlier` has been told is complete."""

    @abstractmethod
    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        """Tell `lane` to copy; if the host's tensor is not page-locked, the host waits for it."""

    @abstractmethod
    def allocate(self, like: Tensor) -> Tensor:
        """Memory on the device that the way back may write to at once; when dropped it may be given out again."""

    @abstractmethod
    def page_locked(self, num_bytes: int) -> Tensor:
        """Page-locked memory, num_bytes x uint8.

        Raises:
            RuntimeError: there is none.
        """

    @abstractmethod
    def wait(self, lane: Lane) -> None:
        """The host waits for all that `lane` has been told."""


class CudaLanes(AbstractLanes):
    """The current stream and two of our own; memory belongs to the stream of the way back."""

    is_apart = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ways = {lane: torch.cuda.Stream(device) for lane in (Lane.OUT, Lane.BACK)}

    def after(self, later: Lane, earlier: Lane) -> None:
        self._stream(later).wait_stream(self._stream(earlier))

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        on_host = target if target.device.type == "cpu" else source
        with torch.cuda.stream(self._stream(lane)):
            target.copy_(source, non_blocking=on_host.is_pinned())

    def allocate(self, like: Tensor) -> Tensor:
        with torch.cuda.stream(self._stream(Lane.BACK)):
            return torch.empty_like(like, device=self._device)

    def page_locked(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def wait(self, lane: Lane) -> None:
        self._stream(lane).synchronize()

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if lane is Lane.COMPUTE else self._ways[lane]


class SynchronousLanes(AbstractLanes):
    """Every copy is complete when `copy` returns: a CPU, which needs none, and accelerators without CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.is_apart = device.type != "cpu"

    def after(self, later: Lane, earlier: Lane) -> None:
        pass

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def allocate(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device=self._device)

    def page_locked(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def wait(self, lane: Lane) -> None:
        pass


def open_lanes(device: torch.device) -> AbstractLanes:
    """The lanes of a device."""
    return CudaLanes(device) if device.type == "cuda" else SynchronousLanes(device)


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """Host memory; (num_bytes,), uint8."""

    memory: Tensor
    is_page_locked: bool


class HostMemory:
    """Host memory that is page-locked once and used again.

    Sizes are powers of two, as torch rounds page-locked memory up to them.

    Args:
        lanes: make page-locked memory.
        max_pinned_bytes: no more than so many are page-locked; None: no limit.
    """

    def __init__(self, lanes: AbstractLanes, *, max_pinned_bytes: int | None) -> None:
        self._lanes = lanes
        self._max_pinned_bytes = max_pinned_bytes
        self._may_pin = max_pinned_bytes != 0
        self._free: defaultdict[int, list[Buffer]] = defaultdict(list)
        self._taken: dict[int, Buffer] = {}

    @property
    def pinned_bytes(self) -> int:
        """Bytes that are page-locked, in use or free."""
        buffers = [*self._taken.values(), *(buffer for free in self._free.values() for buffer in free)]
        return sum(buffer.memory.nbytes for buffer in buffers if buffer.is_page_locked)

    def take(self, like: Tensor) -> Tensor:
        """A host tensor of the shape, strides and dtype of `like`, its values undefined."""
        num_bytes = 1 << (max(like.nbytes, 1) - 1).bit_length()
        free = self._free[num_bytes]
        buffer = free.pop() if free else self._new(num_bytes)
        self._taken[_address(buffer.memory)] = buffer
        strides = torch.empty_like(like, device="meta").stride()
        return buffer.memory[: like.nbytes].view(like.dtype).as_strided(like.shape, strides)

    def give_back(self, tensor: Tensor) -> None:
        """What `take` gave; it is read and written no more before the next `take`."""
        buffer = self._taken.pop(_address(tensor))
        free = self._free[buffer.memory.nbytes]
        free.insert(len(free) if buffer.is_page_locked else 0, buffer)

    def forget(self) -> None:
        """What was taken is not coming back: somebody may still read it."""
        self._taken.clear()

    def _new(self, num_bytes: int) -> Buffer:
        if self._may_pin:
            memory = self._pinned(num_bytes)
            if memory is not None:
                return Buffer(memory=memory, is_page_locked=True)
        return Buffer(memory=torch.empty(num_bytes, dtype=torch.uint8), is_page_locked=False)

    def _pinned(self, num_bytes: int) -> Tensor | None:
        if self._max_pinned_bytes is not None and self.pinned_bytes + num_bytes > self._max_pinned_bytes:
            reason = f"max_pinned_bytes={self._max_pinned_bytes} is reached"
        else:
            try:
                return self._lanes.page_locked(num_bytes)
            except RuntimeError as error:
                reason = f"page-locking {num_bytes} more failed ({str(error).splitlines()[0]})"
        self._may_pin = False
        logger.warning(
            "Offload: %s at %d page-locked bytes; from here on state goes to pageable memory, and training waits for "
            "those copies. Free host memory, raise `ulimit -l` or max_pinned_bytes, or train fewer blocks.",
            reason,
            self.pinned_bytes,
        )
        return None


class Transfer:
    """Moves states to the host and back in the order of the module's docstring.

    Between `begin` and `settle` a switch is under way: tensors on the host may not be read, nor those that came used.

    Args:
        lanes: the device.
        max_pinned_bytes: limit of page-locked host memory; None: none.
    """

    def __init__(self, lanes: AbstractLanes, *, max_pinned_bytes: int | None) -> None:
        self._lanes = lanes
        self._host = HostMemory(lanes, max_pinned_bytes=max_pinned_bytes)
        self._read: list[Tensor] = []
        self._is_under_way = False

    def adopt(self, state: State, names: Sequence[str]) -> None:
        """A new state moves to memory that the way back may use when it has left."""
        if not self._lanes.is_apart:
            return
        moved = {name: self._lanes.allocate(state[name]) for name in names}
        self._lanes.after(Lane.COMPUTE, Lane.BACK)
        for name, target in moved.items():
            self._lanes.copy(Lane.COMPUTE, target, state[name])
        state.update(moved)

    def begin(self) -> None:
        """The computation is through with what will leave."""
        self.settle()
        self._lanes.after(Lane.OUT, Lane.COMPUTE)
        self._lanes.after(Lane.BACK, Lane.COMPUTE)
        self._is_under_way = True

    def send(self, state: State, names: Sequence[str]) -> None:
        """To the host; the device's memory is free for what comes from here on."""
        if not self._lanes.is_apart:
            return
        for name in names:
            host = self._host.take(state[name])
            self._lanes.copy(Lane.OUT, host, state[name])
            state[name] = host
        self._lanes.after(Lane.BACK, Lane.OUT)

    def fetch(self, state: State, names: Sequence[str]) -> None:
        """To the device."""
        if not self._lanes.is_apart:
            return
        for name in names:
            device = self._lanes.allocate(state[name])
            self._lanes.copy(Lane.BACK, device, state[name])
            self._read.append(state[name])
            state[name] = device

    def settle(self) -> None:
        """The computation from here on may use what came; the host does not wait."""
        if not self._is_under_way:
            return
        self._lanes.after(Lane.COMPUTE, Lane.BACK)
        for host in self._read:
            self._host.give_back(host)
        self._read.clear()
        self._is_under_way = False

    def wait(self) -> None:
        """The host may read what left."""
        self.settle()
        self._lanes.wait(Lane.OUT)

    def forget(self) -> None:
        """All states are gone; what they held on the host may still be read by somebody else."""
        self.settle()
        self._host.forget()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
