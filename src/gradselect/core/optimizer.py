"""What the two optimizers share: the manners of a torch optimizer whose parameters are fixed for life."""

from __future__ import annotations

from abc import ABC
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradselect.usage import UsageError

from .parameter_groups import Group

Record = TypeVar("Record")


class SelectiveOptimizer(Optimizer, ABC, Generic[Record]):
    """A torch optimizer with fixed groups that reports each step as a record.

    Attributes:
        last_record: what the last step did; None before the first.
    """

    def __init__(self, groups: list[Group], defaults: dict[str, Any]) -> None:
        self._sealed = False
        super().__init__(groups, defaults)
        self._sealed = True
        self._step = 0
        self._record_hooks: OrderedDict[int, Callable[[Record], None]] = OrderedDict()
        self.last_record: Record | None = None

    @property
    def num_steps(self) -> int:
        """Steps taken so far; the number of the coming one."""
        return self._step

    def add_record_hook(self, hook: Callable[[Record], None]) -> RemovableHandle:
        """Call `hook(record)` with the record of each step, until the handle that is returned is removed."""
        handle = RemovableHandle(self._record_hooks)
        self._record_hooks[handle.id] = hook
        return handle

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: parameters and groups are fixed for life.

        Raises:
            UsageError: always, once the optimizer is built.
        """
        if self._sealed:
            name = type(self).__name__
            raise UsageError(f"param_groups of {name} are fixed; build a new {name} on the whole model")
        super().add_param_group(param_group)

    def __getstate__(self) -> NoReturn:
        raise UsageError(f"{type(self).__name__} cannot be copied or pickled whole; save optimizer.state_dict()")

    def _evaluate(self, closure: Callable[[], float] | None) -> float | None:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _report(self, record: Record) -> None:
        self.last_record = record
        for hook in self._record_hooks.values():
            hook(record)
