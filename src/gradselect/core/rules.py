"""HOW a selected weight moves: pure update rules and the makers of their state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

State = dict[str, Tensor]
"""One parameter's state by name, e.g. step, exp_avg, exp_avg_sq and, for a half-precision model, master."""


class AbstractRule(ABC):
    """One update formula. It knows nothing of blocks or policies: the tensors it is given are the ones that move.

    Example:
        >>> class SignSGD(AbstractRule):
        ...     state_names = ()
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
    """

    state_names: tuple[str, ...]
    """The large entries of the state (moments and what belongs to them); they follow the residency."""

    works_on_shards: bool = True
    """Whether a state can be cut wherever its weight is: no entry of it belongs to weights of two processes."""

    @abstractmethod
    def make_state(self, weight: Tensor) -> State:
        """State of a weight that has never moved, in the weight's dtype and on its device."""

    def counter_device(self, weight: Tensor) -> torch.device:
        """Where the entries of the state live that are not large: step counters."""
        return torch.device("cpu")

    @abstractmethod
    def update(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> None:
        """Move `weights` in place and advance `states`; `group` holds the hyper-parameters."""


@dataclass(frozen=True)
class AdamWRule(AbstractRule):
    """Adam with decoupled weight decay, in torch's own functional form.

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
        w <- w - lr weight_decay w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    `t` counts the updates of this very weight, so a block that is selected late gets its own bias correction.

    Args:
        fused: one kernel for all tensors of a block instead of torch's loop over them: faster, equal to rounding only.
            Default False: bitwise what `torch.optim.AdamW(foreach=False)` computes.

    Example:
        >>> weight, grad, rule = torch.ones(2), torch.ones(2), AdamWRule()
        >>> group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 0.0}
        >>> rule.update([weight], [grad], [rule.make_state(weight)], group)
        >>> weight
        tensor([0.9000, 0.9000])

    Reference:
        Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2.
    """

    fused: bool = False
    state_names = ("exp_avg", "exp_avg_sq")

    def make_state(self, weight: Tensor) -> State:
        step = torch.zeros((), dtype=torch.float32, device=self.counter_device(weight))
        return {"step": step, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def counter_device(self, weight: Tensor) -> torch.device:
        # The unfused loop reads the counter on the host; the fused kernel wants it beside the weight.
        return weight.device if self.fused else torch.device("cpu")

    def update(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        adamw(
            list(weights),
            list(grads),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=False,
            fused=self.fused,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
