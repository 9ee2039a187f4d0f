"""Linear layer whose weight is cut into slices that train on their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional

from gradselect.core import Region
from gradselect.usage import UsageError

from .shared_inputs import SharedInputs
from .sliced_product import COLUMNS, ActiveSlices, SlicedProduct, merged

NO_SHARDS = (
    "Slices work on one device and under DistributedDataParallel; to shard, as torch.distributed.fsdp.fully_shard and "
    'FSDP2 in Accelerate do, write by="layer" or by="matrix" (method.blocks in a recipe) instead of columns or rows'
)


class SlicedLinear(nn.Linear):
    """Linear layer whose weight is one tensor in memory and several parameters: ranges of its columns or rows.

    The slices are views of the whole weight, which the forward pass uses. `weight` is the whole, without a gradient.
    State dicts hold the plain names `weight` and `bias`. `slice_linear` makes one of a plain layer.

    Attributes:
        whole_weight: the weight. Shape (out_features, in_features).
        slice_dim: dimension that is cut: 1 for columns, 0 for rows.
        slice_names: names of the slices among the parameters, "weight_columns_0" and so on.
        slice_bounds: range of each slice: first, and one past the last.
        shared_inputs: of all sliced linears of a layer.
        checkpoint_regions: place of each slice in `weight`, for `gradselect.core.places_of`.
    """

    whole_weight: Tensor
    slice_dim: int
    slice_names: tuple[str, ...]
    slice_bounds: tuple[tuple[int, int], ...]
    shared_inputs: SharedInputs
    _slices: tuple[Parameter, ...]
    _addresses: tuple[int, ...]

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The whole weight, without a gradient."""
        return self.whole_weight.detach()

    @property
    def kind(self) -> str:
        """Name of the cut: "columns" or "rows"."""
        return "columns" if self.slice_dim == COLUMNS else "rows"

    @property
    def checkpoint_regions(self) -> Mapping[str, Region]:
        return {
            name: Region(tensor="weight", dim=self.slice_dim, first=first, end=end)
            for name, (first, end) in zip(self.slice_names, self.slice_bounds, strict=True)
        }

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            # torch then runs what is around this layer uncompiled, and the optimizer refuses its first step.
            raise UsageError("slices are not for torch.compile, which would compile anew for each new set of them")
        self.settle()
        training = torch.is_grad_enabled()
        active = [number for number, each in enumerate(self._slices) if each.requires_grad] if training else ()
        if not active:
            return functional.linear(input, self.whole_weight, self.bias)
        ranges, sizes = merged([self.slice_bounds[number] for number in active])
        slices = ActiveSlices(
            dim=self.slice_dim, ranges=ranges, sizes=sizes, parameters=self._slices, shared=self.shared_inputs
        )
        chosen = [self._slices[number] for number in active]
        return SlicedProduct.apply(input, self.whole_weight, self.bias, slices, *chosen)  # pyright: ignore

    def link(self, whole: Tensor) -> None:
        """Use this tensor as the weight: the slices become views of it, and stay the parameters that they are."""
        self.whole_weight = whole
        for name, (first, end) in zip(self.slice_names, self.slice_bounds, strict=True):
            self._parameters[name] = _viewing(self._parameters[name], whole.narrow(self.slice_dim, first, end - first))
        self._slices = tuple(self._slice(name) for name in self.slice_names)
        self._addresses = tuple(each.data_ptr() for each in self._slices)

    def _slice(self, name: str) -> Parameter:
        found = self._parameters[name]
        assert found is not None
        return found

    def settle(self) -> None:
        """Take over slices that were given other memory (`parameter.data = ...`).

        Raises:
            UsageError: something has put other parameters in the place of the slices.
        """
        # Loops and lists: around a layer that torch.compile cannot compile it traces this function, and of a generator
        # it walks all that the module knows, now and then deeper than Python allows.
        for name, each in zip(self.slice_names, self._slices, strict=True):
            if self._parameters.get(name) is not each:
                raise UsageError(
                    f"something has replaced the slices of a linear layer by parameters of its own. {NO_SHARDS}"
                )
        if [each.data_ptr() for each in self._slices] != list(self._addresses):
            with torch.no_grad():
                self.link(torch.cat([each.detach() for each in self._slices], self.slice_dim))

    # What torch does with parameters ---------------------------------------------------------------------------------

    @contextmanager
    def _as_plain(self) -> Iterator[dict[str, Parameter | None]]:
        """Show the parameters of the plain layer."""
        own, trains = self._parameters, any(each.requires_grad for each in self._slices)
        plain = {"weight": Parameter(self.whole_weight, requires_grad=trains), "bias": own["bias"]}
        self._parameters = plain
        try:
            yield plain
        finally:
            self._parameters = own
            own["bias"] = plain["bias"]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        with self._as_plain():
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        with self._as_plain() as plain:
            before = plain["weight"]
            super()._load_from_state_dict(*arguments, **options)
            after = plain["weight"]
        assert after is not None
        if after is not before or after.data_ptr() != self.whole_weight.data_ptr():
            self.link(after.detach())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        whole = fn(self.whole_weight)
        super()._apply(fn, recurse)
        self.link(whole)
        return self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.link(self.whole_weight)

    def extra_repr(self) -> str:
        """Return the sizes, and the number of slices."""
        return f"{super().extra_repr()}, {self.kind}={len(self.slice_names)}"


def _viewing(parameter: Parameter | None, view: Tensor) -> Parameter:
    """Return the parameter with the memory of `view`; a new one where torch cannot exchange the memory."""
    assert parameter is not None
    if not torch._has_compatible_shallow_copy_type(parameter, view):  # pyright: ignore[reportPrivateImportUsage]
        return Parameter(view, requires_grad=parameter.requires_grad)
    # Not through the constructor: then the slices of a weight would share one version counter.
    parameter.data = view
    return parameter


def bounds_of(size: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Return `parts` ranges that cover 0, ..., size - 1; their sizes differ by at most one.

    >>> bounds_of(7, 3)
    ((0, 3), (3, 5), (5, 7))
    """
    small, larger = divmod(size, parts)
    ends = [small * number + min(number, larger) for number in range(parts + 1)]
    return tuple(pairwise(ends))


def names_of(dim: int, parts: int) -> tuple[str, ...]:
    """Return the names of the slices as parameters of their layer."""
    kind = "columns" if dim == COLUMNS else "rows"
    return tuple(f"weight_{kind}_{number}" for number in range(parts))


def cut(linear: nn.Linear, *, dim: int, parts: int, shared: SharedInputs) -> None:
    """Turn a plain layer into a sliced one, in place."""
    weight, bias = linear._parameters.pop("weight"), linear._parameters.pop("bias")
    assert weight is not None
    names = names_of(dim, parts)
    for name in names:
        empty = torch.empty(0, dtype=weight.dtype, device=weight.device)
        linear._parameters[name] = Parameter(empty, requires_grad=weight.requires_grad)
    linear._parameters["bias"] = bias
    linear.__class__ = SlicedLinear
    assert isinstance(linear, SlicedLinear)
    linear.slice_dim, linear.slice_names = dim, names
    linear.slice_bounds = bounds_of(weight.shape[dim], parts)
    linear.shared_inputs = shared
    linear.link(weight.detach())


def join(linear: SlicedLinear) -> None:
    """Turn a sliced layer into a plain one, in place."""
    slices: Sequence[Parameter] = linear._slices
    linear.settle()
    weight = Parameter(linear.whole_weight, requires_grad=any(each.requires_grad for each in slices))
    bias = linear._parameters["bias"]
    for name in ("whole_weight", "slice_dim", "slice_names", "slice_bounds", "shared_inputs", "_slices", "_addresses"):
        del linear.__dict__[name]
    linear.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
    linear._parameters = {"weight": weight, "bias": bias}
