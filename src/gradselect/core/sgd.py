"""SGD with momentum on whole tensors and on entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from gradselect.usage import UsageError

from .rules import AbstractRule, Ages, State


@dataclass(frozen=True, kw_only=True)
class SGDRule(AbstractRule):
    """SGD with momentum and coupled weight decay, as in `torch.optim.SGD`.

        g <- g + weight_decay w,   b <- momentum b + g
        w <- w - lr (g + momentum b)   if nesterov, else   w <- w - lr b

    State is one number per entry, half of AdamW's, and none with `momentum=0`. `betas` and `eps` are not used.

    Args:
        momentum: decay rate of the buffer b, in [0, 1). It is in `param_groups`, so that schedulers may change it.
        nesterov: use Nesterov momentum; needs `momentum` > 0.

    Raises:
        UsageError: a momentum outside [0, 1), or `nesterov` without one.

    Example:
        >>> import torch, gradselect as gs
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = gs.SparseOptimizer(model, gs.ID3(budget=4, steps=2), rule=gs.SGDRule(momentum=0.9), lr=0.1)
        >>> optimizer.param_groups[0]["momentum"]
        0.9

    Reference:
        Sutskever, Martens, Dahl, Hinton: On the importance of initialization and momentum in deep learning, ICML 2013,
        in the form that torch documents for `torch.optim.SGD`.
    """

    momentum: float = 0.9
    nesterov: bool = False
    state_names: tuple[str, ...] = field(init=False, repr=False)
    momentum_name: str | None = field(init=False, repr=False)
    hyper_parameters = ("lr", "weight_decay")
    decouples_decay = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum={self.momentum} is outside [0, 1); write momentum=0.9")
        if self.nesterov and not self.momentum:
            raise UsageError("nesterov=True needs a momentum; write momentum=0.9")
        object.__setattr__(self, "state_names", ("momentum_buffer",) if self.momentum else ())
        object.__setattr__(self, "momentum_name", "momentum_buffer" if self.momentum else None)

    @property
    def identity(self) -> str:
        # A buffer of another momentum, or none, would be continued silently.
        return f"SGDRule(momentum={float(self.momentum)}, nesterov={self.nesterov})"

    def group_options(self) -> dict[str, Any]:
        # Without a buffer a scheduler must not believe that it changes the momentum.
        return {"momentum": self.momentum} if self.momentum else {}

    def make_state(self, weight: Tensor) -> State:
        # torch starts the buffer with a copy of the gradient; from zeros the first step is the same.
        state = {name: torch.zeros_like(weight) for name in self.state_names}
        return {"step": torch.zeros((), dtype=torch.float32), **state}

    def update(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> None:
        sgd(
            list(weights),
            list(grads),
            [state.get("momentum_buffer") for state in states],
            foreach=False,
            fused=False,
            weight_decay=group["weight_decay"],
            momentum=group.get("momentum", 0.0),
            lr=group["lr"],
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
        )
        for state in states:
            state["step"] += 1

    @property
    def coasts(self) -> bool:
        return self.momentum > 0

    def coast(self, weights: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]) -> None:
        """b <- momentum b, then w <- w - lr momentum b if nesterov, else w <- w - lr b."""
        for weight, state in zip(weights, states, strict=True):
            buffer = state["momentum_buffer"].mul_(group["momentum"])
            weight.sub_(buffer.mul(group["lr"] * (group["momentum"] if self.nesterov else 1.0)))

    def update_entries(
        self, weights: Tensor, gradients: Tensor, state: Mapping[str, Tensor], ages: Ages, group: Mapping[str, Any]
    ) -> None:
        buffer = state.get("momentum_buffer")
        options = {"lr": group["lr"], "weight_decay": group["weight_decay"], "nesterov": self.nesterov}
        sgd_entries(weights, gradients, buffer, momentum=group.get("momentum", 0.0), **options)


def sgd_entries(
    weights: Tensor,  # (320_000,)
    gradients: Tensor,  # (320_000,)
    buffer: Tensor | None,  # (320_000,)
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """One SGD step on flat arrays, in place; see `SGDRule` for the formula.

    Example:
        >>> import torch
        >>> weights, buffer = torch.ones(2), torch.zeros(2)
        >>> for _ in range(2):
        ...     sgd_entries(weights, torch.ones(2), buffer, lr=0.1, momentum=0.5, weight_decay=0.0, nesterov=False)
        >>> weights
        tensor([0.7500, 0.7500])
    """
    if weight_decay:
        gradients = gradients.add(weights, alpha=weight_decay)
    direction = gradients
    if buffer is not None and momentum:
        buffer.mul_(momentum).add_(gradients)
        direction = gradients.add(buffer, alpha=momentum) if nesterov else buffer
    weights.add_(direction, alpha=-lr)
