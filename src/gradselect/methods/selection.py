"""Base class of the methods that select: what builds their optimizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from torch import nn

from gradselect.blocks import BlockOptimizer
from gradselect.entries import SparseOptimizer
from gradselect.usage import check_whole

from .base import AbstractMethod, Loss, RunFacts


class AbstractSelectionMethod(AbstractMethod):
    """A method on `gradselect.BlockOptimizer` or `gradselect.SparseOptimizer`.

    Attributes:
        optimizer_class: class of the optimizer.

    Example:
        >>> import gradselect as gs
        >>> gs.method({"name": "id3", "density": 0.01}).optimizer_class.__name__
        'SparseOptimizer'
    """

    optimizer_class: ClassVar[type[BlockOptimizer] | type[SparseOptimizer]]

    @property
    def num_batches(self) -> int:
        """Number of batches that the method needs before the first step."""
        return 0

    @abstractmethod
    def optimizer_options(self, model: nn.Module, facts: RunFacts, *, head: Collection[str] = ()) -> dict[str, Any]:
        """Return the arguments of the optimizer that the method decides.

        Args:
            model: model to train.
            facts: facts of the run.
            head: names of parameters that train at every step beside the selected ones.

        Raises:
            UsageError: the method does not fit the model.
        """

    def check_needs_no_application(self) -> None:
        """Refuse settings that only `gradselect train` can follow. Default: there are none.

        Raises:
            UsageError: names the setting.
        """

    def make_optimizer(
        self,
        model: nn.Module,
        *,
        lr: float,
        seed: int = 0,
        num_steps: int | None = None,
        epoch_steps: int | None = None,
        batches: Sequence[Any] = (),
        loss: Loss | None = None,
        **options: Any,
    ) -> BlockOptimizer | SparseOptimizer:
        """Build the optimizer of `model`.

        Args:
            model: model to train.
            lr: learning rate.
            seed: seed of the selection.
            num_steps: optimizer steps of the run, for a method that spreads its selection over them. Fills in
                `explore_steps`, if they are left open, with a quarter of them.
            epoch_steps: optimizer steps of an epoch; `explore_steps` left open are at most these, as in a Trainer.
            batches: as many batches as `num_batches`, for a method that looks at data before the first step.
            loss: loss of a batch. None: the model computes it.
            options: further arguments of `optimizer_class`: `weight_decay`, `accumulation_steps`, ...

        Raises:
            UsageError: the method does not fit the model, or the optimizer refuses a value.

        Example:
            >>> import gradselect as gs
            >>> model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
            >>> optimizer = gs.method({"name": "uniform", "count": 1}).make_optimizer(model, lr=1e-3)
            >>> optimizer.defaults["lr"]
            0.001
            >>> method = gs.method({"name": "adagradselect", "count": 1})
            >>> method.make_optimizer(model, lr=1e-3, num_steps=100).policy.known_explore_steps()
            25
        """
        self.check_needs_no_application()
        for given, steps in {"num_steps": num_steps, "epoch_steps": epoch_steps}.items():
            if steps is not None:
                check_whole(given, steps)
        facts = RunFacts(seed=seed, num_steps=num_steps, batches=batches, loss=loss)
        optimizer = self.optimizer_class(model, **{"lr": lr, **self.optimizer_options(model, facts), **options})
        if isinstance(optimizer, BlockOptimizer):
            optimizer.policy.fill_explore_steps(epoch_steps, run_steps=num_steps)
        return optimizer
