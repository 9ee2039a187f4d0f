"""Contract of an update rule: one formula for blocks and for entries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from gradselect.parallel import is_dtensor
from gradselect.usage import UsageError

State = dict[str, Tensor]
"""State of one parameter by name, e.g. step, exp_avg, exp_avg_sq and, for half-precision weights, master."""

DEFAULTS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
"""Defaults of settings that only some rules use."""


class Ages(NamedTuple):
    """Number of updates of each entry, the current one included.

    Attributes:
        updates: int32, shape (n,), or (1,) if equal for all.
        most: the largest of them, known on the host without waiting for the device.
    """

    updates: Tensor
    most: int


class AbstractRule(ABC):
    """One update formula. It knows nothing of policies or masks: every tensor passed to it moves.

    Blocks and entries use the same rule. `update` moves whole tensors, each with a state of its own; `update_entries`
    moves the selected entries of many tensors, gathered into one flat array, each with an age of its own.

    Example:
        >>> class SignSGD(AbstractRule):
        ...     state_names = ()
        ...     hyper_parameters = ("lr", "weight_decay")
        ...
        ...     def make_state(self, weight):
        ...         return {}
        ...
        ...     def update(self, weights, grads, states, group):
        ...         for weight, grad in zip(weights, grads):
        ...             weight.sub_(grad.sign(), alpha=group["lr"])
        >>> weight = torch.tensor([1.0, 2.0])
        >>> SignSGD().update([weight], [torch.tensor([3.0, -3.0])], [{}], {"lr": 0.5})
        >>> weight
        tensor([0.5000, 2.5000])
        >>> SignSGD().works_on_entries
        False
    """

    hyper_parameters: tuple[str, ...] = ("lr", "betas", "eps", "weight_decay")
    """Settings of the optimizer that the rule uses; its `param_groups` hold them."""

    momentum_name: str | None = None
    """Name of the first moment in the state of a whole tensor, in full precision. None: it has none."""

    works_on_shards: bool = True
    """True if the state may be cut into shards as its weight is."""

    decouples_decay: bool = True
    """True if weight decay acts on the weight (AdamW), False if it is added to the gradient (SGD)."""

    why_whole_tensors: str = "works on whole tensors only"
    """Reason why single entries cannot move, where `works_on_entries` is False."""

    state_names: tuple[str, ...]
    """Names of the large state tensors (moments and their scales); they follow the residency."""

    @property
    def works_on_entries(self) -> bool:
        """True if the rule has `update_entries`."""
        return type(self).update_entries is not AbstractRule.update_entries

    @property
    def name(self) -> str:
        """Name in messages."""
        return type(self).__name__

    @property
    def identity(self) -> str:
        """Name that a checkpoint and the run that loads it must agree on."""
        return type(self).__name__

    @property
    def coasts(self) -> bool:
        """True if the rule has `coast`."""
        return type(self).coast is not AbstractRule.coast

    def on(self, device: torch.device) -> AbstractRule:
        """Return the rule as it works on weights on `device`; itself by default."""
        return self

    def group_options(self) -> dict[str, Any]:
        """Return the rule's own hyper-parameters, which every parameter group holds beside `hyper_parameters`."""
        return {}

    def check_weight(self, name: str, weight: Tensor) -> None:
        """Refuse a weight that the rule cannot move; none by default."""

    def large_names(self, state: Mapping[str, Tensor]) -> list[str]:
        """Return the names of the large tensors of a state, which follow the residency."""
        return [name for name in self.state_names if name in state]

    @abstractmethod
    def make_state(self, weight: Tensor) -> State:
        """Return the initial state of a weight, in its dtype and on its device."""

    def counter_device(self, weight: Tensor) -> torch.device:
        """Return the device of step counters."""
        return torch.device("cpu")

    @abstractmethod
    def update(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> None:
        """Move `weights` in place and advance `states`; `group` holds the hyper-parameters."""

    def coast(self, weights: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]) -> None:
        """Move `weights` in place by their momentum alone, which decays; see `gradselect.Borders`."""
        raise NotImplementedError(type(self).__name__)

    def update_entries(
        self, weights: Tensor, gradients: Tensor, state: Mapping[str, Tensor], ages: Ages, group: Mapping[str, Any]
    ) -> None:
        """Move entries in place and advance their state.

        Args:
            weights: shape (n,), float32 or float64.
            gradients: shape (n,), same dtype.
            state: tensors of `state_names`, shape (n,) each.
            ages: number of updates of each entry.
            group: the hyper-parameters.
        """
        raise NotImplementedError(type(self).__name__)


def check_unused(rule: AbstractRule, **settings: Any) -> None:
    """Refuse settings that the rule would ignore.

    Raises:
        UsageError: one differs from its default and the rule does not use it.
    """
    for name, value in settings.items():
        if name not in rule.hyper_parameters and value != DEFAULTS[name]:
            raise UsageError(f"{name}={value} has no meaning for {rule.name}; leave {name} out")


def check_shards(parameters: Iterable[Parameter], rule: AbstractRule) -> None:
    """Refuse shards if the rule's state cannot be cut into shards.

    Raises:
        UsageError: names the rule.
    """
    if not rule.works_on_shards and any(map(is_dtensor, parameters)):
        raise UsageError(
            f"{rule.name} keeps numbers that several entries share, and shards would cut them apart; write "
            "rule=gs.AdamWRule(), or train replicas with DistributedDataParallel"
        )
