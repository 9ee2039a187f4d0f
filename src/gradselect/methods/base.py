"""Base class of all methods."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .settings import Settings

Loss = Callable[[nn.Module, Any], Tensor]
"""Maps a model and a batch to the loss."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts of the run that a method may need.

    Args:
        seed: seed of the run.
        num_steps: optimizer steps of the run. None: an integration fills them in when training begins.
        batches: as many batches as the method's `num_batches`, on the model's device.
        loss: loss of a batch. None: the model computes it.
        earlier: state_dict of the optimizer of the checkpoint that the run resumes from. None: there is none, or it
            does not matter to the method.

    Example:
        >>> RunFacts(seed=1, num_steps=1000).batches
        ()
    """

    seed: int
    num_steps: int | None = None
    batches: Sequence[Any] = ()
    loss: Loss | None = None
    earlier: Mapping[str, Any] | None = None


class AbstractMethod(Settings, ABC):
    """The section `method` of a recipe.

    Attributes:
        name: name of the method in recipes, suites and reports.
        can_resume: True if a checkpoint holds everything that decides the next step.
    """

    can_resume: ClassVar[bool] = True

    if TYPE_CHECKING:
        # Each method declares its own `Literal`, after the keys that it shares with others of its kind.
        name: Any

    def __reduce__(self) -> Any:
        # pickle finds classes by their name in a module, and those of policies and masks are made without one.
        return _from_values, (self.model_dump(exclude_unset=True),)


def _from_values(values: dict[str, Any]) -> AbstractMethod:
    from .parse import parse_method  # it imports this module

    return parse_method(values)
