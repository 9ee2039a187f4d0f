"""Updates inside the backward pass: a weight moves the moment its gradient is whole, and the gradient goes at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from gradselect.core import BlockStates, Group, ParameterTable
from gradselect.parallel import is_running
from gradselect.usage import UsageError

from .observer import GradientObserver


class BackwardUpdates:
    """Applies the rule to each expected parameter when its gradient has been accumulated, then frees the gradient.

    With L the loss, w_1, ..., w_n the expected parameters in the order in which the backward pass completes them:

        g <- dL/dw_i,   (w_i, s_i) <- R(w_i, g, s_i),   g is freed,   for i = 1, ..., n

    so one gradient exists at a time instead of n. A gradient is complete only when everything that reads the weight
    has been visited, so no later part of the pass sees a weight that has moved already; torch's version counters raise
    if a model keeps a use of it out of the graph. The numbers are those of an update after the pass.

    Hooks are registered once, while everything is trainable, and after the observer's: it has measured a gradient
    before it is used up.

    Args:
        states: apply the rule.
        table: finds parameters and their groups.
        observer: knows whether a newer optimizer has taken the model over.

    Reference:
        Lv et al.: Full Parameter Fine-tuning for Large Language Models with Limited Resources (LOMO), arXiv
        2306.09782, section 3.1, for fusing gradient computation and update.
    """

    def __init__(self, states: BlockStates, table: ParameterTable, observer: GradientObserver) -> None:
        self._states = states
        self._table = table
        self._observer = observer
        self._names: tuple[str, ...] = ()
        self._groups: dict[Parameter, Group] = {}
        self._moved: set[Parameter] = set()
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(_weak_hook(self)) for parameter in table.all()
        ]

    def expect(self, names: Sequence[str]) -> None:
        """The parameters of these blocks move in the coming backward pass; `()`: none does."""
        self._names = tuple(names)
        self._groups = {
            parameter: group
            for name in names
            for group, parameters in self._table.by_group(name)
            for parameter in parameters
        }
        self.restart()

    def restart(self) -> None:
        """A new step: nothing has moved yet."""
        self._moved.clear()

    @property
    def has_moved(self) -> bool:
        """Whether a parameter has moved since the last step."""
        return bool(self._moved)

    def moved(self, parameter: Parameter) -> bool:
        """Whether it has moved since the last step."""
        return parameter in self._moved

    @torch.no_grad()
    def arrived(self, parameter: Parameter) -> None:
        """The hook: the gradient of `parameter` is whole."""
        group = self._groups.get(parameter)
        if group is None or not self._observer.owns(parameter):
            return
        if parameter in self._moved:
            raise UsageError(
                "a second backward pass before optimizer.step(), but update_in_backward=True has moved the weights in "
                "the first; call optimizer.step() after each, or, to accumulate gradients, leave update_in_backward "
                "out; where a step was left out call optimizer.zero_grad()"
            )
        if not self._moved:
            self._states.admit(self._names)
        self._moved.add(parameter)
        self._states.update([parameter], group)
        parameter.grad = None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def check_update_in_backward(*, accumulation_steps: int, grad_scaler: GradScaler | None) -> None:
    """Nothing waits for all gradients between the backward pass and the update.

    Raises:
        UsageError: says what does.
    """
    if accumulation_steps > 1:
        raise UsageError(
            f"update_in_backward=True with accumulation_steps={accumulation_steps}: each backward pass would be a "
            "step; leave update_in_backward out, or write accumulation_steps=1 with a larger batch"
        )
    if grad_scaler is not None:
        raise UsageError(
            "update_in_backward=True with a grad_scaler, which looks for overflow in all gradients before any is used; "
            "leave update_in_backward out, or train in bfloat16, which needs no scaler"
        )
    if is_running():
        raise UsageError(
            "update_in_backward=True under torch.distributed, where a gradient is averaged after it has arrived; leave "
            "update_in_backward out on several processes"
        )


def _weak_hook(updates: BackwardUpdates) -> Callable[[Tensor], None]:
    """A hook that does not keep a discarded optimizer's state alive."""
    reference = weakref.ref(updates)

    def hook(parameter: Tensor) -> None:
        alive = reference()
        if alive is not None:
            assert isinstance(parameter, Parameter)
            alive.arrived(parameter)

    return hook
