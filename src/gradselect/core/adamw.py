"""AdamW on whole tensors and on entries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gradselect.usage import check_is

from .devices import has_fused_kernels
from .rules import AbstractRule, Ages, State


@dataclass(frozen=True)
class AdamWRule(AbstractRule):
    """Adam with decoupled weight decay.

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
        w <- w - lr weight_decay w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    `t` counts the updates of this tensor or entry, so one that is selected late gets its own bias correction.

    Args:
        fused: use one kernel for all tensors of a block instead of a loop: faster, equal up to rounding. Default False:
            bitwise equal to `torch.optim.AdamW(foreach=False)`. None: the kernel for weights on an accelerator, the
            loop on a CPU. The optimizers' `rule=None` is `AdamWRule(fused=None)`.

    Example:
        >>> weight, grad, rule = torch.ones(2), torch.ones(2), AdamWRule()
        >>> group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 0.0}
        >>> rule.update([weight], [grad], [rule.make_state(weight)], group)
        >>> weight
        tensor([0.9000, 0.9000])

    Reference:
        Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2.
    """

    fused: bool | None = False
    state_names = ("exp_avg", "exp_avg_sq")
    momentum_name = "exp_avg"

    def __post_init__(self) -> None:
        if self.fused is not None:
            check_is(self.fused, bool, name="fused", example="fused=True, fused=False or fused=None")

    def make_state(self, weight: Tensor) -> State:
        step = torch.zeros((), dtype=torch.float32, device=self.counter_device(weight))
        return {"step": step, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def counter_device(self, weight: Tensor) -> torch.device:
        # The loop reads the counter on the host; the fused kernel needs it on the weight's device.
        return weight.device if self._is_fused(weight.device) else torch.device("cpu")

    def on(self, device: torch.device) -> AdamWRule:
        return self if self.fused is not None else replace(self, fused=self._is_fused(device))

    def _is_fused(self, device: torch.device) -> bool:
        return has_fused_kernels(device) if self.fused is None else self.fused

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
            fused=self._is_fused(weights[0].device),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def coast(self, weights: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]) -> None:
        """m <- beta1 m, w <- w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps); v, t and decay rest."""
        beta1, beta2 = group["betas"]
        for weight, state in zip(weights, states, strict=True):
            # Counters may be on the device, so nothing here waits for a number. 1 - beta^t would lose digits in fp32.
            first, second = (-torch.expm1(state["step"] * _log(beta)) for beta in (beta1, beta2))
            mean = state["exp_avg"].mul_(beta1)
            denominator = (state["exp_avg_sq"] / second).sqrt_().add_(group["eps"])
            weight.sub_(mean.div(denominator).mul_(group["lr"] / first))

    def update_entries(
        self, weights: Tensor, gradients: Tensor, state: Mapping[str, Tensor], ages: Ages, group: Mapping[str, Any]
    ) -> None:
        options = {name: group[name] for name in self.hyper_parameters}
        adamw_entries(weights, gradients, state["exp_avg"], state["exp_avg_sq"], ages, **options)


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def adamw_entries(
    weights: Tensor,  # (320_000,)
    gradients: Tensor,  # (320_000,)
    mean: Tensor,  # (320_000,) - first moment
    square: Tensor,  # (320_000,) - second moment
    ages: Ages,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step on flat arrays, in place; each entry has its own bias correction.

        m <- m + (1 - beta1) (g - m),   v <- beta2 v + (1 - beta2) g^2
        w <- w (1 - lr weight_decay) - (lr / (1 - beta1^t)) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    On the CPU bitwise equal to `torch.optim.AdamW(foreach=False)` on a tensor of that age. Other devices may round in
    another order.

    Example:
        >>> import torch
        >>> weights, mean, square = torch.ones(3), torch.zeros(3), torch.zeros(3)
        >>> ages = Ages(torch.ones(1, dtype=torch.int32), most=1)
        >>> options = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 0.0}
        >>> adamw_entries(weights, torch.ones(3), mean, square, ages, **options)
        >>> weights
        tensor([0.9000, 0.9000, 0.9000])

    Reference:
        Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv 1711.05101, algorithm 2.
    """
    beta1, beta2 = betas
    first, second = (_bias_corrections(beta, _length(ages.most)) for beta in betas)
    step_size = (-lr / first).to(mean).index_select(0, ages.updates)
    root = second.sqrt().to(mean).index_select(0, ages.updates)
    # The order of operations is torch's on the CPU, so that results are bitwise equal.
    weights.mul_(1 - lr * weight_decay)
    mean.lerp_(gradients, 1 - beta1)
    square.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    denominator = square.sqrt().div_(root).add_(eps)
    weights.add_(step_size.mul(mean).div_(denominator))


def _length(oldest: int) -> int:
    """Length of a table of bias corrections: a power of two above `oldest`, so that log2(steps) tables are made."""
    return max(64, 1 << oldest.bit_length())


@lru_cache(maxsize=8)
def _bias_corrections(beta: float, length: int) -> Tensor:
    """Return 1 - beta^t for t = 0, ..., length - 1, with Python's power as in torch. Shape (length,), float64."""
    return torch.tensor([1 - beta**t for t in range(length)], dtype=torch.float64, device="cpu")
