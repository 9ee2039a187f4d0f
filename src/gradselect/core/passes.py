"""End of a backward pass, seen from hooks inside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

Call = Callable[[], None]


class BackwardPasses:
    """Calls back when a backward pass ends.

    A reentrant checkpoint runs a backward pass of its own inside the pass. Only the outermost one counts: the watch
    over the model announces it when the gradient of the model's output arrives. Without an announcement, a pass is the
    one that runs when `at_end` is called.
    """

    def __init__(self) -> None:
        self._calls: dict[Call, bool] = {}
        self._is_queued = False

    def announce(self) -> None:
        """Take the running pass as the outermost one, unless one is known."""
        if not self._is_queued:
            self._is_queued = True
            at_end_of_pass(self._end)

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
            self._is_queued = False

    def _end(self) -> None:
        self._is_queued = False
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
