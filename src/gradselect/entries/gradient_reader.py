"""Reader of gradients in the backward pass: each is read when it is complete, then freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import Parameter

from gradselect.core import AbstractGradientHooks, BackwardPasses, Ownership, dense
from gradselect.parallel import has_other_ranks, is_averaged_in_hooks, is_running, local_part

WAITING = 1 << 20
"""Number of entries of small gradients that are read together; one by one, each would find cold caches."""

Read = Callable[[str, Tensor, bool], None]
"""Called with the parameter's name, its flat gradient, and True if entries are selected by this gradient."""


class GradientReader(AbstractGradientHooks):
    """Passes the gradient of each parameter to `read` after the last backward pass of the window, then frees it.

    Only one gradient is alive at a time, beside those that autograd itself holds and small ones that wait to be read
    together (at most `WAITING` entries or a quarter of the largest tensor). With gradient accumulation there are two
    ways:

    * Gradients accumulate in `parameter.grad` and are read in the last pass: exact, but as large as the model.
    * `lean`: each pass is read by itself and freed; entries are selected by the gradient of the first. A pass
      beyond the expected ones is read so too.

    Within reentrant checkpoints a gradient may arrive in parts: it is read when the pass ends, see `BackwardPasses`.

    On several ranks a gradient is read when it is averaged. The local part of a DTensor's gradient (`fully_shard`,
    `replicate`) is read as above. DistributedDataParallel averages after the hooks, so `read_rest` reads the others.

    Attributes:
        late: names of parameters whose gradients are read in `read_rest`.
        saw_all: False if a pass of this window, or another part of a gradient, came after the gradients were read by
            which entries are selected.
        is_in_parts: True if that was a part.

    Args:
        parameters: by name; all must require a gradient now, or torch refuses the hook.
        read: a bound method.
        ownership: of the optimizer.
        accumulation_steps: backward passes per step.
        lean: see above.
        passes: of the optimizer.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        read: Read,
        ownership: Ownership,
        *,
        accumulation_steps: int,
        lean: bool,
        passes: BackwardPasses,
    ) -> None:
        super().__init__(ownership, accumulation_steps=accumulation_steps, passes=passes)
        self._lean = lean
        self._read = weakref.WeakMethod(read)  # pyright: ignore[reportArgumentType]
        self.parameters = dict(parameters)
        self._active: frozenset[str] = frozenset()
        is_late, self._is_wrapped = has_other_ranks(), is_running()
        self.late = frozenset(name for name, each in parameters.items() if is_late and not is_averaged_in_hooks(each))
        self._capacity = min(WAITING, max(local_part(parameter).numel() for parameter in parameters.values()) // 4)
        self.restart()
        self._register(self.parameters.items())

    def watch(self, names: frozenset[str]) -> None:
        """Read and free the gradients of these parameters only."""
        self._active = names

    def restart(self) -> None:
        self._end_window()
        self.saw_all, self.is_in_parts = True, False
        self._taken: dict[str, int] = {}  # with the number of the pass
        self._kept: list[str] = []
        self._waiting: list[tuple[str, Tensor, bool]] = []

    def read_rest(self) -> None:
        """Read all remaining gradients, also those of a window that ended before its last announced pass."""
        for name, parameter in self.parameters.items():
            if name in self._active and parameter.grad is not None and self._ownership.covers(parameter):
                self._take(name, parameter)
        self._read_waiting()

    @property
    def taken(self) -> frozenset[str]:
        """Names of the parameters whose gradient was read in this window."""
        return frozenset(self._taken)

    def finish_window(self) -> None:
        self.read_rest()

    @property
    def unread(self) -> dict[str, Tensor]:
        """Gradients that exist and wait for `read_rest`: whole ones, by parameter name."""
        return {name: p.grad for name, p in self.parameters.items() if name in self._active and p.grad is not None}

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the gradients that wait to be read."""
        return sum(gradient.nbytes for _, gradient, _ in self._waiting)

    def arrived(self, name: str, parameter: Parameter) -> None:
        if name not in self._active:
            return
        # FSDP2 may finish behind the watch over the model: then its last gradients arrive, and on a GPU all are whole.
        self.passes.at_end(self._end_pass, after_wrappers=self._is_wrapped)
        if name in self.late:
            return
        if self._lean or self._num_counted >= self.num_expected or self._is_last_pass():
            self.passes.at_end(self._read_kept, after_wrappers=self._is_wrapped)
            if self._taken.get(name) == self.passes.number:
                self.passes.arrived_again(parameter)
                self.saw_all, self.is_in_parts = False, True
            if self.passes.may_arrive_again(parameter):
                self._kept.append(name)
            else:
                self._take(name, parameter)

    def _read_kept(self) -> None:
        for name in self._kept:
            if self.parameters[name].grad is not None:
                self._take(name, self.parameters[name])
        self._kept = []
        self._read_waiting()

    def _end_pass(self) -> None:
        self._num_counted += self._counts()

    def _take(self, name: str, parameter: Parameter) -> None:
        # Only once: an entry that is ranked twice could be selected twice.
        decisive = name not in self._taken
        self.saw_all = self.saw_all and (decisive or self._lean)
        self._taken.setdefault(name, self.passes.number)
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
