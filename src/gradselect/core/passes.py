"""End of a backward pass, seen from hooks inside it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Call = Callable[[], None]


class BackwardPasses:
    """Calls back when a backward pass ends.

    A reentrant checkpoint runs a backward pass of its own inside the pass. Only the outermost one counts: the watch
    over the model announces it when the gradient of the model's output arrives. Without an announcement, a pass is the
    one that runs when `at_end` is called.

    A gradient arrives once in each of these passes inside. So a weight that several of them visit, after several
    forward passes or in a layer that is used several times, has its whole gradient at the end of the outermost pass.

    Attributes:
        number: of the outermost pass that runs, or has run last; from 1.
    """

    def __init__(self) -> None:
        self._calls: dict[Call, bool] = {}
        self._is_queued = False
        self._task = -1
        self._num_forwards = 0
        self._in_parts: set[Tensor] = set()
        self.number = 0

    def count_forward(self) -> None:
        """Count a forward pass that leads to the next backward pass; those that checkpoints run again are none."""
        if torch._C._current_graph_task_id() == -1:
            self._num_forwards += 1

    def announce(self) -> None:
        """Take the running pass as the outermost one, unless one is known."""
        if not self._is_queued:
            self._is_queued = True
            self._task = torch._C._current_graph_task_id()
            self.number += 1
            at_end_of_pass(self._end)

    def may_arrive_again(self, parameter: Tensor) -> bool:
        """Return True if the gradient that has just arrived may be a part only; the rest comes in the same pass."""
        is_inside = torch._C._current_graph_task_id() != self._task
        return (is_inside and self._num_forwards > 1) or parameter in self._in_parts

    def arrived_again(self, parameter: Tensor) -> None:
        """Note that `may_arrive_again` was wrong for this parameter, and will be True from now on."""
        if not self._in_parts:
            logger.warning(
                "gradients of weights arrived in several parts within one backward pass, because reentrant checkpoints "
                "share these weights: this step selects without the later parts, or leaves the selection to a later "
                "step. From the next step on the parts are added up; with use_reentrant=False that holds at once"
            )
        self._in_parts.add(parameter)

    def at_end(self, call: Call, *, after_wrappers: bool = False) -> None:
        """Make this call when the pass ends, once, however often it is asked for.

        Args:
            call: without arguments; a bound method.
            after_wrappers: wait until data-parallel wrappers, which finish there too, are done.
        """
        if call not in self._calls:
            self._calls[call] = after_wrappers
            self.announce()

    def forget(self) -> None:
        """Forget a pass that an exception has ended; does nothing during a pass."""
        if torch._C._current_graph_task_id() == -1:
            self._calls.clear()
            if self._is_queued:
                self._is_queued = False
                self._num_forwards = 0

    def _end(self) -> None:
        self._is_queued = False
        self._num_forwards = 0
        for call, after_wrappers in [*self._calls.items()]:
            if after_wrappers:  # gradients that arrive in the meantime belong to this pass
                at_end_of_pass(partial(self._make, call))
            else:
                self._make(call)

    def _make(self, call: Call) -> None:
        if self._calls.pop(call, None) is not None:
            call()


def at_end_of_pass(call: Call) -> None:
    """Queue a call for the end of the running backward pass, as data-parallel wrappers do.

    Wrappers queue theirs when their last gradient arrives, so a call that is queued at the end runs after them.
    """
    torch.autograd.Variable._execution_engine.queue_callback(call)  # pyright: ignore
