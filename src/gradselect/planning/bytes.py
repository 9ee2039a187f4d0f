"""Bytes by category at the moments of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields

import torch

from gradselect.core import HALF, AbstractRule, AdamWRule


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes held at one moment.

    Args:
        weights: all of the model's parameters.
        gradients: of weights, those that exist.
        masters: master weights on the device.
        state_on_device: moments, and the indices of chosen entries.
        state_on_host: moments and masters that are offloaded; no part of the device's total.
        activations: what waits for the backward pass, without logits.
        logits: logits and what the loss makes of them.
        workspace: what lives within one operation; an estimate.
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
        """All of it on the device."""
        return sum(asdict(self).values()) - self.state_on_host

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(**{name: getattr(self, name) + getattr(other, name) for name in CATEGORIES})


CATEGORIES = tuple(field.name for field in fields(Bytes))


def largest(moments: Iterable[Bytes]) -> Bytes:
    """Of each category the most that one of the moments holds; together more than any of them may hold."""
    moments = list(moments)
    return Bytes(**{name: max(getattr(moment, name) for moment in moments) for name in CATEGORIES})


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """What some parameters cost, all of them or those of a block.

    Args:
        elements: how many there are.
        gradients: bytes of their gradients.
        masters: bytes of their master weights.
        moments: bytes of the rule's state, AdamW's two moments say.
        largest: elements of the largest tensor.
    """

    elements: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0
    largest: int = 0

    @property
    def state(self) -> int:
        """Masters and moments, which move together."""
        return self.masters + self.moments

    def __add__(self, other: Tensors) -> Tensors:
        return Tensors(
            elements=self.elements + other.elements,
            gradients=self.gradients + other.gradients,
            masters=self.masters + other.masters,
            moments=self.moments + other.moments,
            largest=max(self.largest, other.largest),
        )


def cost(
    parameters: Iterable[torch.Tensor], *, master_dtype: torch.dtype | None, rule: AbstractRule | None = None
) -> Tensors:
    """Sizes of a rule's state, exactly: what it makes of the weight, or of the master that a half one has.

    Args:
        parameters: tensors, also on the meta device.
        master_dtype: of master weights of half-precision tensors; None: none.
        rule: default `AdamWRule()`.
    """
    total, rule = Tensors(), AdamWRule() if rule is None else rule
    for parameter in parameters:
        number, itemsize = parameter.numel(), parameter.element_size()
        has_master = master_dtype is not None and parameter.dtype in HALF
        master_itemsize = master_dtype.itemsize if has_master and master_dtype is not None else 0
        moving = torch.empty_like(parameter, dtype=master_dtype if has_master else None, device="meta")
        state = rule.make_state(moving)
        total += Tensors(
            elements=number,
            gradients=number * itemsize,
            masters=number * master_itemsize,
            moments=sum(state[name].nbytes for name in rule.state_names if name in state),
            largest=number,
        )
    return total


def together(parts: Iterable[Tensors]) -> Tensors:
    """The sum."""
    return sum(parts, start=Tensors())


def upper(parts: Mapping[str, Tensors], count: int) -> Tensors:
    """The `count` largest of some blocks: no choice of so many costs more."""
    return together(sorted(parts.values(), key=lambda part: part.elements, reverse=True)[:count])
