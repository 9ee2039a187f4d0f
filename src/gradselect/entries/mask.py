"""The contract of a mask: the selection of entries that train.

There are two kinds. A **compact** mask holds a set of entries; only they have optimizer state, and only they move.
Before step t the optimizer asks for its `choice`:

    None              the set stays as it is
    TopOfGradient     after the backward pass: the entries of largest `score(weight, gradient)`, in place of the set
                      (`replace=True`) or in addition to it (`replace=False`). An addition takes entries of a score
                      above 0 only; a gradient of 0 must score 0 or less.
    FromWeights       before the backward pass: the entries that `choose(step, model)` names, in place of the set

A score is elementwise, so the optimizer ranks the entries of each tensor in its backward hook and frees the gradient.
Entries that stay when the set is replaced keep their state and their age.

A **dense** mask selects at every step from whole gradients or their momentum, and every entry has optimizer state: it
saves movement of the weights, not memory.

On several ranks weights and gradients are DTensors if the model is sharded. `score` sees local parts; `choose` returns
indices in the whole tensor, at least those of this rank's local part.

`choice`, `score`, `choose` and `masks` are pure: they depend on the settings, the step and their arguments. So a
resumed run needs nothing but the entries.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradselect.usage import UsageError, check_positive, check_whole, matching

Indices = Mapping[str, Tensor]
"""Flat indices (int64, ascending) of selected entries, by tensor name. A tensor that is left out has none."""


@dataclass(frozen=True)
class MaskTensor:
    """A tensor of the model, with entries that a mask may select.

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
    """Choice of the entries of largest `score(weight, gradient)`.

    Attributes:
        counts: number of entries: an int over all tensors together, a mapping by tensor name for each.
        replace: True: they become the set, and entries of the set compete too. False: they join the set, if they are
            not in it and their score is above 0.
    """

    counts: int | Mapping[str, int]
    replace: bool = False


@dataclass(frozen=True)
class FromWeights:
    """Choice of the entries that `choose(step, model)` returns, in place of the set."""


Choice = TopOfGradient | FromWeights


@dataclass(eq=False, kw_only=True)
class AbstractMask(ABC):
    """Common part of compact and dense masks. A concrete mask is one final dataclass whose fields are its settings.

    Attributes:
        among: names or globs of parameters that the mask selects from, e.g. `("*.mlp.*",)`; None: all that it can use.
        tensors: those parameters, in model order; empty until bound.
        filled_steps: argument of `fill_steps`, if the mask needed it. A checkpoint keeps it.
        method_name: `method.name` in recipes. None: no method is this mask alone.

    Example:
        >>> import gradselect as gs
        >>> tensor = MaskTensor(name="weight", parameter=Parameter(torch.zeros(2, 3)), module=nn.Linear(3, 2))
        >>> gs.ID3(budget=4, steps=2, among=("w*",)).bind([tensor]).names
        ('weight',)
    """

    method_name: ClassVar[str | None] = None

    among: Sequence[str] | None = None
    tensors: tuple[MaskTensor, ...] = field(default=(), init=False, repr=False)
    filled_steps: int | None = field(default=None, init=False, repr=False)

    def bind(self, tensors: Sequence[MaskTensor]) -> Self:
        """Return a copy of this mask that selects among `tensors`. The original stays unbound.

        Raises:
            UsageError: a name of `among` matches nothing, or the settings do not fit these tensors.
        """
        bound = copy.copy(self)
        bound.tensors = tuple(tensor for tensor in matching_tensors(tensors, self.among) if self.can_use(tensor))
        if not bound.tensors:
            raise UsageError(
                f"{type(self).__name__} finds no tensor to select entries of; write among=None or other names"
            )
        bound.start()
        return bound

    def can_use(self, tensor: MaskTensor) -> bool:
        """Return True if the method is meant for such a tensor. Default: always."""
        return True

    def fill_steps(self, num_steps: int) -> None:
        """Tell the mask the optimizer steps of the whole training, which settings may leave open. Default: no use."""

    def check_ready(self) -> None:
        """Check before each step that no setting is open any more. Default: none ever is.

        Raises:
            UsageError: names the setting.
        """

    @abstractmethod
    def start(self) -> None:
        """Check the settings against `self.tensors`."""

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the constructor as plain values; a checkpoint keeps them to refuse another mask."""
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
        """Return the choice of step `step` (from 0) for a set of `num_chosen` entries."""

    def score(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Return a score for each entry, elementwise, for `TopOfGradient`; NaN is never selected. Shape kept."""
        raise AssertionError(f"{type(self).__name__} never selects by gradient")

    def least_gradient(self, score: float) -> float:
        """Return a lower bound of |gradient| for all entries with at least this score; 0.0: not known.

        It spares the scoring of most entries. It may be too small, never too large: allow for rounding.
        """
        return 0.0

    def choose(self, step: int, model: nn.Module) -> Indices:
        """Return the entries of step `step`, for `FromWeights`."""
        raise AssertionError(f"{type(self).__name__} never selects by weights")


@dataclass(eq=False, kw_only=True)
class AbstractDenseMask(AbstractMask):
    """Selects at every step from whole gradients; see the module docstring.

    Attributes:
        mask: "gradient": the gradient of other entries is zero, and the state of all entries advances. "update": the
            state sees the whole gradient, and other entries do not move.
        ranks: tensors that `masks` gets: "gradient", all gradients of the step together; "momentum", the first moment
            of one tensor after the step's gradient. That needs `mask="update"` and a rule with momentum.

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

    ranks: ClassVar[Literal["gradient", "momentum"]] = "gradient"

    mask: Literal["gradient", "update"] = "gradient"

    @abstractmethod
    def masks(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return a bool tensor for each gradient or moment: the selected entries, in the shape of its local part."""


SELECTABLE = "parameter to select from (a frozen or quantised one cannot train, and one in always trains whole)"
"""What the parameters of a mask are called where a name matches none of them."""


def matching_tensors(tensors: Sequence[MaskTensor], patterns: str | Sequence[str] | None) -> tuple[MaskTensor, ...]:
    """Return the tensors whose name matches one of the globs, in order; all for None.

    Raises:
        UsageError: a pattern matches nothing.
    """
    if patterns is None:
        return tuple(tensors)
    names = matching([tensor.name for tensor in tensors], patterns, kind=SELECTABLE)
    return tuple(tensor for tensor in tensors if tensor.name in names)


def check_trains(mask: AbstractMask, always: Collection[str]) -> None:
    """Check that a mask selects from something, or that something trains beside it.

    Args:
        mask: bound.
        always: names of the tensors that train whole.

    Raises:
        UsageError: nothing would train.
    """
    if not mask.tensors and not always:
        raise UsageError(
            f"nothing would train: {type(mask).__name__} has no entries, and always names no tensor; write e.g. "
            'always=("classifier.*",)'
        )


def check_size(*, budget: int | None, density: float | None) -> None:
    """Check that exactly one of `budget` >= 1 and `density` in (0, 1] is given.

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
    """Return the number of entries: `budget`, or max(1, round(density * entries of all tensors)).

    Raises:
        UsageError: more than there are.
    """
    total = sum(tensor.numel for tensor in tensors)
    if budget is None:
        assert density is not None
        return max(1, round(density * total))
    if budget > total:
        raise UsageError(f"budget={budget:,} is more than the {total:,} entries to select from; write budget={total}")
    return budget


def share_out(tensors: Sequence[MaskTensor], budget: int) -> dict[str, int]:
    """Share `budget` entries out in proportion to the tensors' sizes, by largest remainder; ties to the earlier."""
    total = sum(tensor.numel for tensor in tensors)
    counts = [budget * tensor.numel // total for tensor in tensors]
    remainders = [budget * tensor.numel % total for tensor in tensors]
    for position in sorted(range(len(tensors)), key=lambda i: -remainders[i])[: budget - sum(counts)]:
        counts[position] += 1
    return {tensor.name: count for tensor, count in zip(tensors, counts, strict=True)}


def generator_of(*, seed: int, step: int, name: str) -> torch.Generator:
    """Return a generator for one tensor at one step: nothing to save, nothing global, the same on every rank.

    It is the CPU's, wherever the tensor lies: generators of other devices give other numbers for the same seed.
    """
    digest = hashlib.blake2b(f"gradselect/{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
