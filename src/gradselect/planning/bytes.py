"""Bytes by category, at one moment of a step and for sets of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch

from gradselect.core import HALF, MEMORY_CATEGORIES, AbstractRule, AdamWRule, num_bytes


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes held at one moment.

    Args:
        weights: all parameters of the model.
        gradients: of weights, those that exist at this moment.
        masters: fp32 copies of half-precision weights, on the device.
        state_on_device: moments, and the indices of a mask's entries.
        state_on_host: offloaded moments and masters; not part of the device's total.
        activations: saved for the backward pass, without logits.
        logits: logits and what the loss makes of them.
        workspace: temporaries of one operation; an estimate.
    """

    weights: int = 0
    gradients: int = 0
    masters: int = 0
    state_on_device: int = 0
    state_on_host: int = 0
    activations: int = 0
    logits: int = 0
    workspace: int = 0

    @property
    def device(self) -> int:
        """Sum of all categories on the device."""
        return sum(asdict(self).values()) - self.state_on_host

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(**{name: getattr(self, name) + getattr(other, name) for name in CATEGORIES})


CATEGORIES = (*MEMORY_CATEGORIES, "activations", "logits", "workspace")
"""Categories of `optimizer.memory()`, and those that it cannot see."""


def largest(moments: Iterable[Bytes]) -> Bytes:
    """Return the maximum of each category. Its sum can exceed every single moment."""
    moments = list(moments)
    return Bytes(**{name: max(getattr(moment, name) for moment in moments) for name in CATEGORIES})


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of training some parameters, in bytes unless it says otherwise.

    Args:
        num_entries: numbers in all their tensors.
        gradients: their gradients.
        masters: their master weights.
        moments: state of the rule, for AdamW two moments.
        largest: entries of the largest tensor.
        largest_gradient: the largest gradient of one tensor; dtypes may differ.
    """

    num_entries: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0
    largest: int = 0
    largest_gradient: int = 0

    @property
    def state(self) -> int:
        """Masters and moments, which move together."""
        return self.masters + self.moments

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            num_entries=self.num_entries + other.num_entries,
            gradients=self.gradients + other.gradients,
            masters=self.masters + other.masters,
            moments=self.moments + other.moments,
            largest=max(self.largest, other.largest),
            largest_gradient=max(self.largest_gradient, other.largest_gradient),
        )


def cost_of(
    parameters: Iterable[torch.Tensor], *, master_dtype: torch.dtype | None, rule: AbstractRule | None = None
) -> Cost:
    """Return the exact cost: the rule makes its state on the meta device, from the master where there is one.

    Args:
        parameters: tensors, also on the meta device.
        master_dtype: dtype of masters of half-precision tensors; None: no masters.
        rule: default `AdamWRule()`.
    """
    total, rule = Cost(), AdamWRule() if rule is None else rule
    for parameter in parameters:
        has_master = master_dtype is not None and parameter.dtype in HALF
        updated = torch.empty_like(parameter, dtype=master_dtype if has_master else None, device="meta")
        state = rule.make_state(updated)
        total += Cost(
            num_entries=parameter.numel(),
            gradients=num_bytes(parameter),
            masters=num_bytes(updated) if has_master else 0,
            moments=sum(num_bytes(state[name]) for name in rule.large_names(state)),
            largest=parameter.numel(),
            largest_gradient=num_bytes(parameter),
        )
    return total


def total_cost(parts: Iterable[Cost]) -> Cost:
    """Return the sum."""
    return sum(parts, start=Cost())


def largest_cost(parts: Mapping[str, Cost], count: int) -> Cost:
    """Return the cost of the `count` largest blocks: no selection of that size costs more."""
    return total_cost(sorted(parts.values(), key=lambda part: part.num_entries, reverse=True)[:count])
