"""Hold of an optimizer on a model: what it freezes, watches and hooks, and gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Self

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from gradselect.parallel import RankAgreement, is_running

from .freezing import Ownership, freeze
from .gradients import AbstractGradientHooks
from .parameter_groups import ParameterTable
from .passes import BackwardPasses
from .watch import ModelWatch


class AbstractHoldingOptimizer(Optimizer, ABC):
    """Optimizer that freezes parts of its model, and gives the model back when it is closed."""

    _hooks: AbstractGradientHooks
    """Reads gradients as they arrive; set by the optimizer when it starts."""

    _table: ParameterTable
    """Finds parameters in the groups."""

    def _hold(self, model: nn.Module, owned: Sequence[Parameter] | None) -> None:
        """Take the model, once groups and table exist."""
        self._model = model
        self._extra_owned = owned
        self._ownership = Ownership(self, self._owned())
        self._passes = BackwardPasses()
        self._watch = ModelWatch(model, self._owned, self._passes)
        self._agreement = RankAgreement(model, self, type(self)._begin_training) if is_running() else None

    def check_model(self) -> None:
        """Check that the model is the one that the optimizer was built for, with the weights of its state.

        The next step does so too. A trainer calls it before the first.

        Raises:
            UsageError: parameters were added or thawed since then, or the weights of a checkpoint were not loaded.
        """
        self._watch.check()

    def close(self) -> None:
        """Give the model back: hooks are removed, frozen parameters trainable again, weights untouched.

        The optimizer keeps its state; `reopen` continues. As a context manager it closes itself at the end of the
        `with` block, whatever ends that.
        """
        self._hooks.close()
        self._watch.close()
        self._passes.forget()
        self._ownership.release()

    def reopen(self) -> None:
        """Take the model again after `close`. Parameters that were frozen meanwhile stay frozen and do not train."""
        if not self._ownership.is_held:
            self._ownership.retake(self._owned())
            self._hooks.open()
            self._watch.open()
            self._continue()

    def __enter__(self) -> Self:
        self.reopen()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _continue(self) -> None:
        """Freeze and observe for the coming step, whose selection is known."""

    def _owned(self) -> Sequence[Parameter]:
        return self._table.all() if self._extra_owned is None else self._extra_owned

    @abstractmethod
    def _begin_training(self) -> None:
        """Several ranks, first forward pass: the model is wrapped as it will be trained. Freeze now."""

    def _may_freeze(self) -> bool:
        """True once a data-parallel wrapper cannot come any more."""
        return self._ownership.is_held and (self._agreement is None or self._agreement.has_begun)

    def _set_trainable(self, names: Collection[str]) -> None:
        """Freeze all blocks but these, once no data-parallel wrapper can come any more."""
        if not self._ownership.is_held:
            return
        for name in self._table.blocks:
            for parameter in self._table.of(name):
                freeze(parameter, name not in names and self._may_freeze())
