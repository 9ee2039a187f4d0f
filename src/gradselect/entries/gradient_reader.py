"""Gradients are read in the backward pass, as soon as each is finished, and freed where that is wanted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from gradselect.core import dense
from gradselect.parallel import is_averaged_in_hooks, is_one_of_many, local_part
from gradselect.usage import UsageError

WAITING = 1 << 20
"""Entries of small gradients that are read together: read one by one, each would find the caches cold."""

Read = Callable[[str, Tensor, bool], None]
"""Called with the parameter's name, its gradient as a flat tensor, and whether a choice of entries is made from it."""


class GradientReader:
    """Hands the gradient of each parameter to `read` when its last backward pass of the window has added to it.

    The gradient is freed then: of all parameters together, no more than one gradient is alive at a time, besides those
    that autograd itself holds, and small ones that wait for each other, of at most `WAITING` entries or a quarter of
    the largest tensor. With several backward passes per step there are two ways:

    * gradients add up in `parameter.grad` and are read in the last pass: exact, and as large as the model until then;
    * `lean`: each pass is read on its own and freed; a choice of entries is made from the first.

    On several processes a gradient is read when they have averaged it: of DTensors (`fully_shard`, `replicate`) as far
    as this process holds it, and as above; of others, which DistributedDataParallel averages, in `read_rest`.

    Parameters are marked with their newest reader (`gradselect_owner`), so an older one falls silent.

    Attributes:
        late: names of those that are read in `read_rest`.

    Args:
        parameters: by name; all must require a gradient now, or torch refuses the hook.
        read: what to do with a gradient.
        lean: see above.
    """

    def __init__(self, parameters: Mapping[str, Parameter], read: Read, *, lean: bool) -> None:
        self.accumulation_steps = 1
        self._lean = lean
        self._read = weakref.WeakMethod(read)  # pyright: ignore[reportArgumentType]
        self.parameters = dict(parameters)
        self._active: frozenset[str] = frozenset()
        is_late = is_one_of_many()
        self.late = frozenset(name for name, each in parameters.items() if is_late and not is_averaged_in_hooks(each))
        self._capacity = min(WAITING, max(local_part(parameter).numel() for parameter in parameters.values()) // 4)
        self.restart()
        for parameter in self.parameters.values():
            parameter.gradselect_owner = id(self)  # pyright: ignore[reportAttributeAccessIssue]
        self._handles = [
            parameter.register_post_accumulate_grad_hook(_weak_hook(self, name))
            for name, parameter in self.parameters.items()
        ]

    def watch(self, names: frozenset[str]) -> None:
        """Read and free the gradients of these; leave others alone."""
        self._active = names

    def restart(self) -> None:
        """A new window: nothing has arrived yet."""
        self._num_passes = dict.fromkeys(self.parameters, 0)
        self._taken: set[str] = set()
        self._waiting: list[tuple[str, Tensor, bool]] = []

    def read_rest(self) -> None:
        """Read what is there still: what waits, and all of a window that ended before its last announced pass."""
        for name, parameter in self.parameters.items():
            if name in self._active and parameter.grad is not None and self.owns(parameter):
                self._take(name, parameter)
        self._read_waiting()

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the gradients that wait to be read."""
        return sum(gradient.nbytes for _, gradient, _ in self._waiting)

    def owns(self, parameter: Tensor) -> bool:
        """Whether no newer optimizer of this package has been put on the same model."""
        return getattr(parameter, "gradselect_owner", None) == id(self)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def arrived(self, name: str, parameter: Parameter) -> None:
        """The hook: a backward pass has added to the gradient of `parameter`."""
        if name not in self._active or not self.owns(parameter):
            return
        self._num_passes[name] += 1
        if self._num_passes[name] > self.accumulation_steps:
            raise UsageError(
                f"backward pass {self._num_passes[name]} before optimizer.step(), but accumulation_steps="
                f"{self.accumulation_steps}: gradients were read and freed after that many; for gradient accumulation "
                "write SparseOptimizer(..., accumulation_steps=<backward passes per step>), in a Trainer "
                "callbacks=[SelectionCallback()]; where a step was skipped call optimizer.zero_grad(); checkpoint "
                "activations with use_reentrant=False"
            )
        if name in self.late:
            return
        if self._lean or self._num_passes[name] == self.accumulation_steps:
            if not self._waiting:
                # The engine's own end of the pass, as data parallel wrappers use it.
                torch.autograd.Variable._execution_engine.queue_callback(self._read_waiting)  # pyright: ignore
            self._take(name, parameter)

    def _take(self, name: str, parameter: Parameter) -> None:
        # Once only: an entry that is offered twice could be chosen twice.
        decisive = name not in self._taken
        self._taken.add(name)
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self._waiting.append((name, dense(local_part(gradient)).detach().reshape(-1), decisive))
        if sum(waiting.numel() for _, waiting, _ in self._waiting) >= self._capacity:
            self._read_waiting()

    def _read_waiting(self) -> None:
        read = self._read()
        for waiting in self._waiting:
            if read is not None:
                read(*waiting)
        self._waiting = []


def _weak_hook(reader: GradientReader, name: str) -> Callable[[Tensor], None]:
    """A hook that does not keep the reader alive."""
    reference = weakref.ref(reader)

    def hook(parameter: Tensor) -> None:
        alive = reference()
        if alive is not None:
            assert isinstance(parameter, Parameter)
            alive.arrived(name, parameter)

    return hook
