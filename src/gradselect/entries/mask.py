"""The contract of a mask: WHICH single weights train.

Two kinds. A **compact** mask holds a set of entries; only they have optimizer state, and only they move. Before step t
it is asked for its `choice`:

    None              the set stays as it is
    TopOfGradient     when the gradients of this step are there: the entries of largest `score(weight, gradient)`,
                      in place of the set (`replace=True`), or in addition to it (`replace=False`): among the others,
                      those with a score above 0, which a gradient of 0 must not have
    FromWeights       before the backward pass: whatever `choose(step, model)` names, in place of the set

A score is elementwise, so the optimizer takes the best entries of each tensor in its backward hook and frees the
gradient. Where the set is replaced, entries that stay keep their moments and their age.

A **dense** mask decides anew at every step, from finished gradients, and every entry has optimizer state: what it saves
is movement of the weights, not memory.

On several processes weights and gradients are DTensors where the model is sharded. `score` sees the part that this
process holds; `choose` gives indices in the whole tensor, at least those of this process' part.

`choice`, `score`, `choose` and `masks` are pure: they depend on the settings, the step and what they are given. So a
resumed run needs nothing but the entries themselves.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.usage import UsageError, check_positive, check_whole, matching

Indices = Mapping[str, Tensor]
"""Flat indices (int64, ascending) of chosen entries, by tensor name. A tensor that is left out has none."""


@dataclass(frozen=True)
class MaskTensor:
    """A tensor of the model that a mask may choose entries of.

    Attributes:
        name: as in `model.named_parameters()`.
        parameter: the tensor itself.
        module: the module that it belongs to.
    """

    name: str
    parameter: Parameter
    module: nn.Module

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.parameter.numel()


@dataclass(frozen=True)
class TopOfGradient:
    """Choose the entries of largest `score(weight, gradient)`.

    Attributes:
        counts: how many: an int over all tensors together, a mapping by tensor name in each.
        replace: in place of the set, where the set competes too; else in addition to it, among entries of a score
            above 0 that are not in the set.
    """

    counts: int | Mapping[str, int]
    replace: bool = False


@dataclass(frozen=True)
class FromWeights:
    """Take what `choose(step, model)` says in place of the set."""


Choice = TopOfGradient | FromWeights


@dataclass(eq=False, kw_only=True)
class AbstractMask(ABC):
    """What compact and dense masks share. A concrete mask is one final dataclass whose fields are its settings.

    Attributes:
        among: names or globs of parameters that the mask chooses from, e.g. `("*.mlp.*",)`; None: all that it can use.
        tensors: those parameters, in model order; empty until bound.
        method_name: `method.name` of the recipes that use it. None: no method is just this mask.

    Example:
        >>> import gradselect as gs
        >>> tensor = MaskTensor(name="weight", parameter=Parameter(torch.zeros(2, 3)), module=nn.Linear(3, 2))
        >>> gs.ID3(budget=4, steps=2, among=("w*",)).bind([tensor]).names
        ('weight',)
    """

    method_name: ClassVar[str | None] = None

    among: Sequence[str] | None = None
    tensors: tuple[MaskTensor, ...] = field(default=(), init=False, repr=False)

    def bind(self, tensors: Sequence[MaskTensor]) -> Self:
        """A copy of this mask that chooses among `tensors`. The original stays unbound.

        Raises:
            UsageError: a name of `among` matches nothing, or the settings do not fit these tensors.
        """
        bound = copy.copy(self)
        bound.tensors = tuple(tensor for tensor in matching_tensors(tensors, self.among) if self.can_use(tensor))
        if not bound.tensors:
            raise UsageError(f"{type(self).__name__} finds no tensor to choose entries of; write among=None or others")
        bound.start()
        return bound

    def can_use(self, tensor: MaskTensor) -> bool:
        """Whether the method is meant for such a tensor at all. Default: yes."""
        return True

    @abstractmethod
    def start(self) -> None:
        """Check the settings against `self.tensors`."""

    def settings(self) -> dict[str, Any]:
        """What was given at construction, as plain values; a checkpoint keeps it so that another mask is refused."""
        return {setting.name: getattr(self, setting.name) for setting in fields(self) if setting.init}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of `tensors`."""
        return tuple(tensor.name for tensor in self.tensors)


@dataclass(eq=False, kw_only=True)
class AbstractCompactMask(AbstractMask):
    """A set of entries; see the module docstring.

    Example:
        A mask that trains the largest entry of each tensor:

        >>> class Largest(AbstractCompactMask):
        ...     def start(self):
        ...         pass
        ...
        ...     def choice(self, step, num_chosen):
        ...         return FromWeights() if step == 0 else None
        ...
        ...     def choose(self, step, model):
        ...         return {tensor.name: tensor.parameter.abs().argmax().view(1) for tensor in self.tensors}
        >>> tensor = MaskTensor(name="weight", parameter=Parameter(torch.tensor([1.0, -3.0])), module=nn.Identity())
        >>> Largest().bind([tensor]).choose(step=0, model=nn.Identity())
        {'weight': tensor([1])}
    """

    @abstractmethod
    def choice(self, step: int, num_chosen: int) -> Choice | None:
        """What to choose at step `step` (from 0), when the set has `num_chosen` entries."""

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Rank of each entry, elementwise, for `TopOfGradient`; larger is better, NaN never chosen. Shape kept."""
        raise AssertionError(f"{type(self).__name__} never chooses by gradient")

    def least_gradient(self, score: float) -> float:
        """What |gradient| an entry must reach to have this score, whatever its weight; 0.0: not known.

        Most entries need not be scored then. It may be too small, never too large: allow for rounding.
        """
        return 0.0

    def choose(self, step: int, model: nn.Module) -> Indices:
        """The entries of step `step`, for `FromWeights`."""
        raise AssertionError(f"{type(self).__name__} never chooses by weights")


@dataclass(eq=False, kw_only=True)
class AbstractDenseMask(AbstractMask):
    """Chooses anew at every step, from whole gradients; see the module docstring.

    Attributes:
        mask: what it is put on: "gradient": other entries count as zero, and the moments of all entries go on;
            "update": the moments see the whole gradient, and other entries do not move.

    Example:
        A mask that selects the entries of positive gradient:

        >>> class Positive(AbstractDenseMask):
        ...     def start(self):
        ...         pass
        ...
        ...     def masks(self, gradients):
        ...         return [gradient > 0 for gradient in gradients]
        >>> Positive().masks([torch.tensor([1.0, -2.0])])
        [tensor([ True, False])]
    """

    mask: Literal["gradient", "update"] = "gradient"

    @abstractmethod
    def masks(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """For each gradient a bool tensor: the entries that count at this step.

        Of the gradient's shape; of a DTensor of the shape of what this process holds.
        """


def matching_tensors(tensors: Sequence[MaskTensor], patterns: str | Sequence[str] | None) -> tuple[MaskTensor, ...]:
    """Return the tensors whose name matches one of the globs, in order; all for None.

    Raises:
        UsageError: a pattern matches nothing.
    """
    if patterns is None:
        return tuple(tensors)
    kind = "parameter that can train (a frozen or quantised one cannot)"
    names = matching([tensor.name for tensor in tensors], patterns, kind=kind)
    return tuple(tensor for tensor in tensors if tensor.name in names)


def check_size(*, budget: int | None, density: float | None) -> None:
    """Exactly one of `budget` >= 1 and `density` in (0, 1] is given.

    Raises:
        UsageError: otherwise.
    """
    if (budget is None) == (density is None):
        raise UsageError(f"got budget={budget} and density={density}; give one of them, e.g. density=0.01")
    if density is not None:
        check_positive("density", density, at_most=1, example=0.01)
    if budget is not None:
        check_whole("budget", budget)


def resolve_budget(tensors: Sequence[MaskTensor], *, budget: int | None, density: float | None) -> int:
    """How many entries: `budget`, or max(1, round(density * entries of all tensors)).

    Raises:
        UsageError: more than there are.
    """
    total = sum(tensor.numel for tensor in tensors)
    if budget is None:
        assert density is not None
        return max(1, round(density * total))
    if budget > total:
        raise UsageError(f"budget={budget:,} is more than the {total:,} entries to choose from; write budget={total}")
    return budget


def share_out(tensors: Sequence[MaskTensor], budget: int) -> dict[str, int]:
    """`budget` entries dealt out in proportion to the tensors' sizes, by largest remainder; ties to the earlier."""
    total = sum(tensor.numel for tensor in tensors)
    counts = [budget * tensor.numel // total for tensor in tensors]
    remainders = [budget * tensor.numel % total for tensor in tensors]
    for position in sorted(range(len(tensors)), key=lambda i: -remainders[i])[: budget - sum(counts)]:
        counts[position] += 1
    return {tensor.name: count for tensor, count in zip(tensors, counts, strict=True)}


def generator_of(*, seed: int, step: int, name: str, device: torch.device) -> torch.Generator:
    """A generator of its own for one tensor at one step: nothing to save, nothing global, alike on every rank."""
    digest = hashlib.blake2b(f"gradselect/{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big") >> 1)
