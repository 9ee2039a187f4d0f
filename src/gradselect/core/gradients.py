"""Measures of gradients, and hooks that see each gradient as it is accumulated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from gradselect.parallel import Groups, has_other_ranks, local_part, shard_groups, total
from gradselect.usage import UsageError

from .freezing import Ownership, is_frozen_for_now
from .hooks import remove_all, remove_with, weak_hook
from .passes import BackwardPasses, at_end_of_pass

Measure = Literal["l2", "l1", "taylor"]
"""Number that a block's gradient g is measured by, w being its weights: "l2" sqrt(sum g^2), "l1" sum |g|, "taylor"
sum |w g|."""

CHUNK = 2**24
"""Entries of a gradient that are summed at once: a sum in fp32 of many more stalls, and products with weights need
memory."""

PATIENCE = 8
"""Windows in a row with fewer backward passes than expected, after which fewer are expected."""


class AbstractGradientHooks(ABC):
    """Calls `arrived(name, parameter)` each time a backward pass has added to the gradient of a parameter.

    Hooks are registered while everything is trainable: torch refuses a hook on a frozen parameter, but an earlier one
    survives freezing. Parameters of a newer optimizer are ignored. The gradient of a parameter that is frozen for the
    moment is freed: somebody thawed it after the selection was made.

    **Windows.** Gradients are read in the last backward pass of a step's window. It is pass number `accumulation_steps`
    or, after a window with more passes, the number that the window had; after `PATIENCE` windows in a row with fewer,
    the number that the last of them had. Only passes count for which `is_counted` returns True.

    Attributes:
        accumulation_steps: backward passes before an optimizer step, >= 1, as announced.
        is_counted: returns True in passes after which the optimizer may step; None: in all. In a Trainer, those of the
            last micro-batch.
        num_passes_before: counted passes of an earlier window if they were more than announced, else 0.
        num_shorter: windows in a row that had fewer than those.
        passes: shared by the hooks of an optimizer; by default only these hooks see them.

    Args:
        ownership: of the optimizer.
        accumulation_steps: see above.
        passes: see above.
    """

    def __init__(self, ownership: Ownership, *, accumulation_steps: int, passes: BackwardPasses | None = None) -> None:
        self.accumulation_steps = accumulation_steps
        self.is_counted: Callable[[], bool] | None = None
        self.num_passes_before = self.num_shorter = 0
        self._num_counted = 0
        self.passes = passes or BackwardPasses()
        self._ownership = ownership
        self._named: list[tuple[str, Parameter]] = []
        self._handles: list[RemovableHandle] = []
        remove_with(self, self._handles)

    def _register(self, named: Iterable[tuple[str, Parameter]]) -> None:
        self._named = list(named)
        self.open()

    def open(self) -> None:
        """Register the hooks, again after `close`. Parameters that the user froze in between get none."""
        self.close()
        self._handles += [
            parameter.register_post_accumulate_grad_hook(weak_hook(self._arrived, name))
            for name, parameter in self._named
            if parameter.requires_grad
        ]

    def _arrived(self, name: str, parameter: Parameter) -> None:
        if not self._ownership.covers(parameter):
            return
        if is_frozen_for_now(parameter):
            _free(parameter)
        else:
            self.arrived(name, parameter)

    @abstractmethod
    def arrived(self, name: str, parameter: Parameter) -> None:
        """Handle the gradient of `parameter`, which was registered under `name`."""

    @abstractmethod
    def restart(self) -> None:
        """Start a new accumulation window, in which nothing has arrived yet."""

    def finish_window(self) -> None:
        """Read what is to be read at the end of the window: no further pass comes."""

    def drop_window(self) -> None:
        """Start a new window, and learn nothing from the passes of this one, which lead to no step."""
        self._num_counted = 0
        self.restart()

    def close(self) -> None:
        """Remove the hooks."""
        remove_all(self._handles)

    @property
    def num_expected(self) -> int:
        """Number of counted passes after which gradients are read."""
        return max(self.accumulation_steps, self.num_passes_before)

    def _counts(self) -> bool:
        return self.is_counted is None or self.is_counted()

    def _is_last_pass(self) -> bool:
        """True in the pass in which gradients are read."""
        return self._num_counted == self.num_expected - 1 and self._counts()

    def _end_window(self) -> None:
        """Learn how many passes to expect in the next window."""
        if self._num_counted:
            self.num_shorter = self.num_shorter + 1 if self._num_counted < self.num_passes_before else 0
            if self.num_shorter in (0, PATIENCE):
                self.num_passes_before = self._num_counted if self._num_counted > self.accumulation_steps else 0
                self.num_shorter = 0
        self._num_counted = 0
        self.passes.forget()


def _free(parameter: Parameter) -> None:
    """Free a gradient that nobody wants; where a data-parallel wrapper still needs it, when the pass has ended."""

    def drop() -> None:
        if is_frozen_for_now(parameter):
            parameter.grad = None

    if has_other_ranks():
        at_end_of_pass(lambda: at_end_of_pass(drop))
    else:
        drop()


def gradient_norm(
    parameters: Sequence[Parameter],
    *,
    measure: Measure = "l2",
    known: Mapping[Parameter, Tensor] = MappingProxyType({}),
) -> Tensor:
    """L2 norm, in fp32, of the gradients of `parameters` as one vector; 0.0 without any gradient. Shape ().

    Counts the local parts of sharded gradients.

    Args:
        parameters: for example those of one block.
        measure: taken instead of the L2 norm; "taylor" reads the weights as they are now.
        known: the same measure of some parameters, taken before; their gradients may be gone.

    Raises:
        UsageError: a gradient is sparse.
    """
    norms = [
        known[parameter] if parameter in known else norm_of(parameter, measure=measure)
        for parameter in parameters
        if parameter in known or parameter.grad is not None
    ]
    if not norms:
        return torch.zeros(())
    stacked = torch.stack([norm.to(norms[0].device) for norm in norms])
    return torch.linalg.vector_norm(stacked) if measure == "l2" else stacked.sum()


def total_norm(parameters: Iterable[Parameter]) -> float:
    """L2 norm of the whole gradients of `parameters` as one vector, over all ranks; 0.0 without any gradient.

    Raises:
        UsageError: a gradient is sparse.
    """
    apart: dict[Groups, list[Parameter]] = {}
    for parameter in parameters:
        apart.setdefault(shard_groups(parameter), []).append(parameter)
    squares = [(several[0], gradient_norm(several).double().square()) for several in apart.values()]
    return float(total(squares).sqrt())


@torch.no_grad()
def norm_of(parameter: Parameter, *, measure: Measure = "l2") -> Tensor:
    """L2 norm or another measure, in fp32, of the local part of an existing gradient. Shape ()."""
    assert parameter.grad is not None
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    gradient = dense(local_part(parameter.grad))
    if measure == "l2":
        return torch.linalg.vector_norm(gradient, dtype=dtype).float()
    factors = (gradient, local_part(parameter)) if measure == "taylor" else (gradient,)
    chunks = zip(*map(_chunks, factors), strict=True)
    sums = [_absolute_sum(*several, dtype=dtype) for several in chunks]
    return torch.stack(sums).sum().float()


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Cut along the first dimension into parts of about `CHUNK` entries."""
    if tensor.ndim == 0 or tensor.numel() == 0:
        return (tensor,)
    return tensor.split(max(1, CHUNK * len(tensor) // tensor.numel()))


def _absolute_sum(gradient: Tensor, weight: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    product = gradient if weight is None else gradient.to(dtype) * weight
    return torch.linalg.vector_norm(product, ord=1, dtype=dtype)


def squared_norm(gradient: Tensor) -> Tensor:
    """Squared L2 norm, in fp32, or in the gradient's dtype if that is wider. Shape ()."""
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)) ** 2


def dense(gradient: Tensor) -> Tensor:
    """Return the gradient if it is dense.

    Raises:
        UsageError: it is sparse.
    """
    if gradient.is_sparse:
        raise UsageError("sparse gradients are not supported; build the embedding with sparse=False")
    return gradient
