"""Named spans of a step, for a meter."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

from torch.utils.hooks import RemovableHandle

from gradselect.usage import UsageError

Span = Callable[[str], AbstractContextManager[Any]]
"""Called with the name of a phase; returns a context manager for it."""

Method = TypeVar("Method", bound=Callable[..., Any])

SELECTION = "selection"
"""Selection by a policy or mask, gradient norms, freezing, records."""

STATE = "state"
"""Moves of optimizer state between device and host, within a selection."""

_NO_SPAN = nullcontext()


class Phases:
    """Phases of one optimizer, and their listener. Without a listener a phase costs one test."""

    def __init__(self) -> None:
        self._spans: OrderedDict[int, Span] = OrderedDict()

    def listen(self, span: Span) -> RemovableHandle:
        """Enter `span(name)` around every phase until the returned handle is removed.

        Raises:
            UsageError: there is a listener already.
        """
        if self._spans:
            raise UsageError("phases() has a listener already; remove it first: handle.remove()")
        handle = RemovableHandle(self._spans)
        self._spans[handle.id] = span
        return handle

    def __call__(self, name: str) -> AbstractContextManager[Any]:
        """Return the context around one phase."""
        for span in self._spans.values():
            return span(name)
        return _NO_SPAN


def in_phase(name: str) -> Callable[[Method], Method]:
    """Run a method within a phase of `self._phases`."""

    def decorate(method: Method) -> Method:
        @wraps(method)
        def within(self: Any, *arguments: Any, **options: Any) -> Any:
            with self._phases(name):
                return method(self, *arguments, **options)

        return within  # pyright: ignore[reportReturnType]

    return decorate
