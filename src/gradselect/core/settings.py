"""Settings of updates that both optimizers share, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from gradselect.usage import UsageError, check_hyper_parameters, check_is

from .adamw import AdamWRule
from .residency import AbstractResidency
from .rules import AbstractRule, check_unused
from .torch_rule import check_no_torch_class


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """Rule, hyper-parameters and residency, named as in the arguments of the optimizers.

    `residency=None` is decided by the device of the weights at the first update, as `AdamWRule(fused=None)` is.

    Raises:
        UsageError: a value is outside its range, or the rule would ignore it.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    no_decay: str | Sequence[str] | None
    master_dtype: torch.dtype | None
    skip_nonfinite: bool
    rule: AbstractRule
    residency: AbstractResidency | None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> UpdateSettings:
        """Pick the settings out of an optimizer's arguments; without a rule it is AdamW's."""
        given: dict[str, Any] = {field.name: arguments.get(field.name) for field in fields(cls)}
        if given["rule"] is None:
            given["rule"] = AdamWRule(fused=None)
        return cls(**given)

    def __post_init__(self) -> None:
        if self.residency is not None:
            check_is(self.residency, AbstractResidency, name="residency", example="residency=gs.Offload()")
        check_no_torch_class(self.rule)
        check_is(self.rule, AbstractRule, name="rule", example="rule=gs.AdamWRule()")
        if self.master_dtype is not None:
            check_is(self.master_dtype, torch.dtype, name="master_dtype", example="master_dtype=torch.float32")
        check_hyper_parameters(lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
        check_unused(self.rule, betas=tuple(self.betas), eps=self.eps)
        if self.weight_decay and "weight_decay" not in self.rule.hyper_parameters:
            raise UsageError(f"{self.rule.name} has no weight decay, and weight_decay={self.weight_decay}; write 0.0")

    def group_options(self) -> dict[str, Any]:
        """Return the hyper-parameters of every parameter group: those that the rule uses."""
        given = {"lr": self.lr, "betas": tuple(self.betas), "eps": self.eps, "weight_decay": self.weight_decay}
        return {name: given[name] for name in self.rule.hyper_parameters} | self.rule.group_options()
