"""Updates of weights by the rule: masters move in place of half-precision weights, and follow writes of others."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from gradselect.parallel import local_part

from .freezing import is_kept_frozen
from .gradients import dense
from .masters import MASTER, MasterWatch, packed
from .parameter_groups import ParameterTable
from .rules import AbstractRule, State
from .state import BlockStates

logger = logging.getLogger(__name__)


class WeightUpdates:
    """Moves the local parts of parameters by the rule.

    A half-precision weight with a master is its master, rounded: the rule moves the master.

    Attributes:
        rule: the update formula.
        moved: parameters that were updated since the last patch.
        refreshed: blocks whose masters followed since they were last taken.

    Args:
        states: of the parameters.
        table: finds the parameters of each block.
    """

    def __init__(self, states: BlockStates, table: ParameterTable, rule: AbstractRule) -> None:
        self._states = states
        self._table = table
        self.rule = rule
        self._masters = MasterWatch()
        self.moved: set[Tensor] = set()
        self.refreshed: list[str] = []

    def update(
        self, parameters: Sequence[Parameter], group: Mapping[str, Any], *, gradient: Tensor | None = None
    ) -> None:
        """Apply the rule to parameters of one group; masters replace half-precision weights in it.

        A parameter without a gradient does not move.

        Args:
            parameters: of the group.
            group: hyper-parameters.
            gradient: replaces the gradient of the only parameter; may have the dtype of its master.

        Raises:
            UsageError: a gradient is sparse.
        """
        grads = [parameter.grad if gradient is None else gradient for parameter in parameters]
        moving = [(parameter, grad) for parameter, grad in zip(parameters, grads, strict=True) if grad is not None]
        if not moving:
            return
        moved = [parameter for parameter, _ in moving]
        states, targets, weights = self._prepared(moved)
        grads = [dense(local_part(grad)).to(weight.dtype) for weight, (_, grad) in zip(weights, moving, strict=True)]
        self.rule.update(weights, grads, states, group)
        self._write(moved, targets, weights)

    def coast(self, parameters: Sequence[Parameter], group: Mapping[str, Any], *, is_all: bool = False) -> None:
        """Let the rule move the parameters that have state by their momentum, as `update` does by gradients.

        A parameter that the user froze while the optimizer was closed does not move.

        Args:
            parameters: of the group.
            group: hyper-parameters.
            is_all: True if that is all that their momentum would still add: none is left.
        """
        moved = [each for each in parameters if self._states.exists(each) and not is_kept_frozen(each)]
        states, targets, weights = self._prepared(moved)
        self.rule.coast(weights, states, group)
        if is_all:
            assert self.rule.momentum_name is not None
            for state in states:
                state[self.rule.momentum_name].zero_()
        self._write(moved, targets, weights)

    def follow_weights(self, names: Collection[str]) -> None:
        """Let masters of resident blocks follow weights that others have changed; `refreshed` names those blocks."""
        masters = self._states.masters_of(names)
        changed = set(map(id, self._masters.follow(masters))) if masters else ()
        if changed:
            self.refreshed += [name for name in names if not changed.isdisjoint(map(id, self._table.of(name)))]
            logger.info("weights of %s were changed by something else; masters follow", ", ".join(self.refreshed))

    def take_refreshed(self) -> tuple[str, ...]:
        """Return the blocks whose masters followed since the last call."""
        taken, self.refreshed = tuple(self.refreshed), []
        return taken

    def refresh_masters(self) -> None:
        """Set masters to the current weights."""
        self._states.wait()
        for parameter, master in self._states.masters().items():
            master.copy_(local_part(parameter))

    def wrote(self, parameter: Parameter) -> None:
        """Note that the optimizer itself has just written a weight, beside `update`."""
        self._masters.wrote(parameter)

    def forget(self) -> None:
        """Compare all masters with their weights at the next step: other states were loaded."""
        self._masters.forget()

    def _prepared(self, parameters: Sequence[Parameter]) -> tuple[list[State], list[Tensor], list[Tensor]]:
        """Return the states, the local parts, and what the rule moves: masters, or the local parts themselves."""
        states, targets = list(map(self._states.of, parameters)), list(map(local_part, parameters))
        return states, targets, [s.get(MASTER, packed(t)) for s, t in zip(states, targets, strict=True)]

    def _write(self, parameters: Sequence[Parameter], targets: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Note that these parameters have moved; round masters to their weights."""
        self.moved.update(parameters)
        for parameter, target, weight in zip(parameters, targets, weights, strict=True):
            if weight is not target:
                target.copy_(weight)
                self._masters.wrote(parameter)
