"""Copies between device and host that run beside the computation, in an order that keeps them right.

A device works on three *streams*: the computation, copies to the host, and copies to the device. Each runs its work in
order. Streams wait for each other only where `after` says so, and the host waits for none. With t the switch from one
selection to the next, and a -> b for "b starts when a is complete":

    compute_t -> to_host_t, to_device_t   the update is in the outgoing state; memory to be written to is no longer used
    to_host of a state -> to_device       incoming state may take its memory, and reads it only when it is complete
    to_device_t -> compute                before the next update

to_device waits after every copy to the host, so after the last line the computation is behind the whole switch: the
next switch may write to the host memory that this one read.
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

from .devices import copy_all
from .rules import State

logger = logging.getLogger(__name__)


class Stream(Enum):
    """Queue of work on a device, run in order."""

    COMPUTE = "compute"
    TO_HOST = "to_host"
    TO_DEVICE = "to_device"


class AbstractStreams(ABC):
    """Streams and memory of one device. `Transfer` decides the order of work on them."""

    has_own_memory: bool
    """True if the device has memory apart from the host's; if False, nothing is ever copied."""

    @abstractmethod
    def after(self, later: Stream, earlier: Stream) -> None:
        """Make future work of `later` wait for all work queued on `earlier` so far."""

    @abstractmethod
    def copy(self, stream: Stream, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Queue one copy or more on `stream`. If a tensor of the host is not page-locked, the host waits for them."""

    @abstractmethod
    def allocate(self, likes: Sequence[Tensor]) -> list[Tensor]:
        """Return device memory that TO_DEVICE may write to at once; it may be reused as soon as it is dropped."""

    @abstractmethod
    def page_locked(self, num_bytes: int) -> Tensor:
        """Return page-locked memory, num_bytes x uint8.

        Raises:
            RuntimeError: there is none left.
        """

    @abstractmethod
    def wait(self, stream: Stream) -> None:
        """Make the host wait for all work queued on `stream`."""


class CudaStreams(AbstractStreams):
    """The current CUDA stream and two more. State memory belongs to TO_DEVICE."""

    has_own_memory = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy_streams = {way: torch.cuda.Stream(device) for way in (Stream.TO_HOST, Stream.TO_DEVICE)}

    def after(self, later: Stream, earlier: Stream) -> None:
        self._cuda_stream(later).wait_stream(self._cuda_stream(earlier))

    def copy(self, stream: Stream, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        on_host = targets if targets[0].device.type == "cpu" else sources
        is_page_locked = all(tensor.is_pinned() for tensor in on_host)
        with torch.cuda.stream(self._cuda_stream(stream)):
            copy_all(targets, sources, non_blocking=is_page_locked)

    def allocate(self, likes: Sequence[Tensor]) -> list[Tensor]:
        with torch.cuda.stream(self._cuda_stream(Stream.TO_DEVICE)):
            return [torch.empty_like(like, device=self._device) for like in likes]

    def page_locked(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def wait(self, stream: Stream) -> None:
        self._cuda_stream(stream).synchronize()

    def _cuda_stream(self, stream: Stream) -> torch.cuda.Stream:
        is_compute = stream is Stream.COMPUTE
        return torch.cuda.current_stream(self._device) if is_compute else self._copy_streams[stream]


class SynchronousStreams(AbstractStreams):
    """Copies that are complete when `copy` returns: for a CPU, which needs none, and accelerators other than CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.has_own_memory = device.type != "cpu"

    def after(self, later: Stream, earlier: Stream) -> None:
        pass

    def copy(self, stream: Stream, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        copy_all(targets, sources)

    def allocate(self, likes: Sequence[Tensor]) -> list[Tensor]:
        return [torch.empty_like(like, device=self._device) for like in likes]

    def page_locked(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def wait(self, stream: Stream) -> None:
        pass


def open_streams(device: torch.device) -> AbstractStreams:
    """Return the streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else SynchronousStreams(device)


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """Piece of host memory: uint8, shape (num_bytes,)."""

    memory: Tensor
    is_page_locked: bool


class HostMemory:
    """Pool of host memory: each piece is page-locked once and reused.

    Sizes are powers of two, to which torch rounds page-locked memory.

    Args:
        streams: of the device; they allocate page-locked memory.
        max_pinned_bytes: limit for page-locked bytes; None: no limit.
    """

    def __init__(self, streams: AbstractStreams, *, max_pinned_bytes: int | None) -> None:
        self._streams = streams
        self._max_pinned_bytes = max_pinned_bytes
        self._may_pin = max_pinned_bytes != 0
        self._free: defaultdict[int, list[Buffer]] = defaultdict(list)
        self._taken: dict[int, Buffer] = {}

    @property
    def pinned_bytes(self) -> int:
        """Number of page-locked bytes, in use or free."""
        buffers = [*self._taken.values(), *(buffer for free in self._free.values() for buffer in free)]
        return sum(buffer.memory.nbytes for buffer in buffers if buffer.is_page_locked)

    def take(self, like: Tensor) -> Tensor:
        """Return a host tensor with the shape, strides and dtype of `like` and undefined values."""
        num_bytes = 1 << (max(like.nbytes, 1) - 1).bit_length()
        free = self._free[num_bytes]
        buffer = free.pop() if free else self._new(num_bytes)
        self._taken[_address(buffer.memory)] = buffer
        strides = like.stride() if like.is_contiguous() else torch.empty_like(like, device="meta").stride()
        return buffer.memory[: like.nbytes].view(like.dtype).as_strided(like.shape, strides)

    def give_back(self, tensor: Tensor) -> None:
        """Return a tensor of `take` to the pool. Nobody may read or write it any more."""
        buffer = self._taken.pop(_address(tensor))
        free = self._free[buffer.memory.nbytes]
        free.insert(len(free) if buffer.is_page_locked else 0, buffer)

    def forget(self) -> None:
        """Never reuse what was taken: somebody may still read it."""
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
                return self._streams.page_locked(num_bytes)
            except RuntimeError as error:
                reason = f"page-locking {num_bytes} more failed ({str(error).splitlines()[0]})"
        self._may_pin = False
        logger.warning(
            "Offload: %s at %d page-locked bytes; further state goes to pageable memory, and training waits for its "
            "copies. Free host memory, raise `ulimit -l` or max_pinned_bytes, or train fewer blocks.",
            reason,
            self.pinned_bytes,
        )
        return None


class Transfer:
    """Moves states to the host and back, in the order that the module docstring gives.

    A switch runs between `begin` and `settle`. Meanwhile tensors on the host must not be read, nor incoming ones used.

    Args:
        streams: of the device.
        max_pinned_bytes: limit for page-locked host memory; None: no limit.
    """

    def __init__(self, streams: AbstractStreams, *, max_pinned_bytes: int | None) -> None:
        self._streams = streams
        self._host = HostMemory(streams, max_pinned_bytes=max_pinned_bytes)
        self._read: list[Tensor] = []
        self._is_switching = False

    def adopt(self, state: State, names: Sequence[str]) -> None:
        """Move a new state to memory that TO_DEVICE may reuse after the state has left."""
        if not self._streams.has_own_memory or not names:
            return
        made = [state[name] for name in names]
        moved = self._streams.allocate(made)
        self._streams.after(Stream.COMPUTE, Stream.TO_DEVICE)
        self._streams.copy(Stream.COMPUTE, moved, made)
        state.update(zip(names, moved, strict=True))

    def begin(self) -> None:
        """Begin a switch: the computation so far is the last to use the outgoing state."""
        self.settle()
        self._streams.after(Stream.TO_HOST, Stream.COMPUTE)
        self._streams.after(Stream.TO_DEVICE, Stream.COMPUTE)
        self._is_switching = True

    def send(self, states: Sequence[tuple[State, Sequence[str]]]) -> None:
        """Move the named tensors of states to the host; later incoming state may take their device memory."""
        if leaving := self._tensors(states):
            hosts = [self._host.take(tensor) for tensor in leaving]
            self._streams.copy(Stream.TO_HOST, hosts, leaving)
            _replace(states, hosts)
            self._streams.after(Stream.TO_DEVICE, Stream.TO_HOST)

    def fetch(self, states: Sequence[tuple[State, Sequence[str]]]) -> None:
        """Move the named tensors of states to the device."""
        if coming := self._tensors(states):
            here = self._streams.allocate(coming)
            self._streams.copy(Stream.TO_DEVICE, here, coming)
            self._read += coming
            _replace(states, here)

    def settle(self) -> None:
        """Let the computation use the incoming state from here on; the host does not wait."""
        if not self._is_switching:
            return
        self._streams.after(Stream.COMPUTE, Stream.TO_DEVICE)
        for host in self._read:
            self._host.give_back(host)
        self._read.clear()
        self._is_switching = False

    def wait(self) -> None:
        """Wait until the host may read the outgoing state."""
        self.settle()
        self._streams.wait(Stream.TO_HOST)

    def forget(self) -> None:
        """Forget all states; somebody else may still read their host memory."""
        self.settle()
        self._host.forget()

    def _tensors(self, states: Sequence[tuple[State, Sequence[str]]]) -> list[Tensor]:
        """Return the tensors to move: none where the device has no memory of its own."""
        return [state[name] for state, names in states for name in names] if self._streams.has_own_memory else []


def _replace(states: Sequence[tuple[State, Sequence[str]]], tensors: Sequence[Tensor]) -> None:
    """Put tensors in the place of the named ones."""
    new = iter(tensors)
    for state, names in states:
        for name in names:
            state[name] = next(new)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
