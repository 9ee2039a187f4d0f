"""Updates inside the backward pass: a weight moves when its gradient is complete, and the gradient is freed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import Parameter

from gradselect.core import (
    AbstractGradientHooks,
    BackwardPasses,
    BlockStates,
    Group,
    Ownership,
    ParameterTable,
    WeightUpdates,
)
from gradselect.usage import UsageError

from .borders import BorderRules


class BackwardUpdates(AbstractGradientHooks):
    """Applies the rule to each selected parameter when its gradient is complete, then frees the gradient.

    With loss L and selected parameters w_1, ..., w_n in the order in which the backward pass completes them:

        g <- dL/dw_i,   (w_i, s_i) <- R(w_i, g, s_i),   g is freed,   for i = 1, ..., n

    So one gradient exists at a time instead of n. A gradient is complete only after every use of its weight has been
    visited, so no later part of the pass sees a moved weight. torch's version counters raise an error if a model hides
    a use from the graph. The numbers equal those of an update after the pass.

    Hooks are registered once, while everything is trainable, and after the observer's, which measures each gradient
    before it is freed. Within reentrant checkpoints a gradient may arrive in parts: its weight moves when the pass
    ends, see `BackwardPasses`.

    Args:
        states: of all blocks.
        updates: apply the rule.
        table: finds parameters and their groups.
        ownership: of the optimizer.
        borders: of the optimizer.
        passes: of the optimizer.
        is_active: if False, nothing moves in the backward pass.

    Reference:
        Lv et al.: Full Parameter Fine-tuning for Large Language Models with Limited Resources (LOMO), arXiv
        2306.09782, section 3.1, for fusing gradient computation and update.
    """

    def __init__(
        self,
        states: BlockStates,
        updates: WeightUpdates,
        table: ParameterTable,
        ownership: Ownership,
        borders: BorderRules,
        *,
        passes: BackwardPasses,
        is_active: bool = True,
    ) -> None:
        super().__init__(ownership, accumulation_steps=1, passes=passes)
        self.is_active = is_active
        self._states = states
        self._updates = updates
        self._table = table
        self._borders = borders
        self._names: tuple[str, ...] = ()
        self._groups: dict[Parameter, tuple[str, Group]] = {}
        self._moved: dict[Parameter, int] = {}  # with the number of the pass
        self._kept: dict[Parameter, None] = {}
        self._register(table.named() if is_active else ())

    def expect(self, names: Sequence[str]) -> None:
        """Move the parameters of these blocks, and no others, in the next backward pass."""
        self._names = tuple(names) if self.is_active else ()
        self._groups = {
            parameter: (name, group)
            for name in self._names
            for group, parameters in self._table.by_group(name)
            for parameter in parameters
        }
        self.restart()

    def restart(self) -> None:
        self._moved.clear()
        self._kept.clear()

    @property
    def has_moved(self) -> bool:
        """True if a parameter has moved since the last step."""
        return bool(self._moved)

    def has_gradient(self, block: str) -> bool:
        """True if a parameter of the block has a gradient, or had one that was applied."""
        return any(parameter.grad is not None or parameter in self._moved for parameter in self._table.of(block))

    @torch.no_grad()
    def arrived(self, name: str, parameter: Parameter) -> None:
        if parameter not in self._groups:
            return
        self.passes.announce()
        if self._moved.get(parameter) == self.passes.number:
            self.passes.arrived_again(parameter)
            raise UsageError(
                f"a part of the gradient of {name} arrived after update_in_backward=True had moved the weight by "
                "another part, because reentrant checkpoints share the weight; write use_reentrant=False, or leave "
                "update_in_backward out"
            )
        if parameter in self._moved:
            raise UsageError(
                "a second backward pass before optimizer.step(), but update_in_backward=True has moved the weights in "
                "the first; call optimizer.step() after each, or leave update_in_backward out to accumulate gradients; "
                "where a step was skipped call optimizer.zero_grad()"
            )
        if self.passes.may_arrive_again(parameter):
            self._kept[parameter] = None
            self.passes.at_end(self._move_kept, after_wrappers=True)  # the observer measures before that
        else:
            self._move(parameter)

    @torch.no_grad()
    def _move_kept(self) -> None:
        while self._kept:
            self._move(self._kept.popitem()[0])

    def _move(self, parameter: Parameter) -> None:
        if not self._moved:
            self._states.admit((*self._names, *self._borders.coasting(self._names)))
            self._updates.follow_weights(self._names)
        self._moved[parameter] = self.passes.number
        self._updates.update([parameter], self._borders.group_of(*self._groups[parameter]))
        parameter.grad = None
