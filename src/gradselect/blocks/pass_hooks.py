"""Everything of a BlockOptimizer that hooks into backward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter

from .backward_updates import BackwardUpdates
from .compile_check import UnreachedBlocks
from .observer import GradientObserver
from .reach import Reach

if TYPE_CHECKING:
    from .optimizer import BlockOptimizer


class PassHooks:
    """Hooks of one BlockOptimizer into backward passes. They are registered while everything is trainable.

    Attributes:
        observer: measures gradients, and frees those that cannot be selected.
        updates: moves weights within the pass, if that is asked for. Its hooks come after the observer's.
        reach: finds the blocks that the loss reaches.

    Args:
        optimizer: holds its model, all of it trainable.
        accumulation_steps: backward passes per step.
        grad_scaler: of the loop, if there is one.
        update_in_backward: True if weights move within the pass.
    """

    def __init__(
        self,
        optimizer: BlockOptimizer,
        accumulation_steps: int,
        grad_scaler: GradScaler | None,
        *,
        update_in_backward: bool,
    ) -> None:
        model, table, ownership = optimizer._model, optimizer._table, optimizer._ownership
        is_one_of_many = optimizer._agreement is not None
        self._blocks = table.blocks
        self.observer = GradientObserver(
            optimizer._parameters_by_block(),
            ownership,
            measure=optimizer.policy.measured(),
            accumulation_steps=accumulation_steps,
            grad_scaler=grad_scaler,
            is_one_of_many=is_one_of_many,
            phases=optimizer._phases,
            passes=optimizer._passes,
        )
        self.updates = BackwardUpdates(
            optimizer._states,
            optimizer._updates,
            table,
            ownership,
            optimizer._borders,
            passes=optimizer._passes,
            is_active=update_in_backward,
        )
        self._compiled = UnreachedBlocks(model)
        named = {*optimizer.policy.names, *optimizer._always}
        names = [name for name in table.blocks if name in named]
        self.reach = Reach(model, table, names, ownership, self.observer, is_one_of_many=is_one_of_many)

    def saw_gradients(self) -> bool:
        """Return True if a gradient has arrived since the last step."""
        self.reach.take_back()
        # A decision that keeps no block has released all gradients; only the observer knows that there were some.
        return self.observer.saw_gradients or any(map(self.updates.has_gradient, self._blocks))

    def learns_reach(self, selected: Sequence[str]) -> bool:
        """Learn which blocks the loss reaches; see `Reach.conclude`."""
        return self.reach.conclude(selected, has_gradient=self.updates.has_gradient)

    def check_compiled(self, selected: Sequence[str], norms: Mapping[str, float]) -> None:
        """Refuse a step in which a selected block of a compiled model never gets a gradient."""
        self._compiled.check(selected, norms, has_gradient=self.updates.has_gradient)

    @property
    def has_worked(self) -> bool:
        """True if weights have moved, or a gradient that is not zero was measured, since the last step."""
        return self.updates.has_moved or any(self.observer.norms().values())

    def restart(self) -> None:
        """Begin a new accumulation window."""
        self.observer.drop_window()
        self.updates.restart()
        self.reach.restart()

    def follow(self, parameters: Mapping[str, Sequence[Parameter]]) -> None:
        """Hook into the parameters that a wrapper has put in place of others."""
        self.observer.follow(parameters)
        self.reach.follow()

    def open(self) -> None:
        """Register again what `close` removed."""
        self.updates.open()
        self.reach.begin(self.reach.state())

    def close(self) -> None:
        """Remove all hooks but the observer's."""
        self.updates.close()
        self.reach.end()
