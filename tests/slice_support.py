"""Names of the blocks of a sliced model, a look at its slices, and the loop that trains one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tiny_models import tiny_batch
from torch import Tensor, nn

import gradselect as gs
from gradselect.core import StepRecord
from gradselect.slices import SlicedLinear, sliced_linears

LAYERS = 3
SLICES = tuple(
    name
    for layer in range(LAYERS)
    for name in (*(f"layer.{layer}.columns.{part}" for part in range(8)), f"layer.{layer}.vectors")
)
SLICED = ("embedding", *SLICES, "norm", "head")


def in_layer(layer: int, selected: Iterable[str]) -> list[str]:
    """Return the slices of the layer among the selected blocks."""
    return [name for name in selected if name.startswith(f"layer.{layer}.columns.")]


def train(model: nn.Module, optimizer: gs.BlockOptimizer, steps: Iterable[int]) -> Iterator[StepRecord]:
    """Take the steps of these numbers, each on a batch of its own; yield their records."""
    for step in steps:
        model(**tiny_batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.last_record is not None
        yield optimizer.last_record


def parts_of(gradient: Tensor, layer: SlicedLinear) -> list[Tensor]:
    """The readable twin: cut the gradient of the whole weight."""
    return [gradient.narrow(layer.slice_dim, first, end - first) for first, end in layer.slice_bounds]


def is_linked(model: nn.Module) -> bool:
    """True if every slice is the memory of that part of its whole weight that it stands for, whatever is in it."""
    return all(
        layer.get_parameter(name).data_ptr() == part.data_ptr()
        and layer.get_parameter(name).stride() == part.stride()
        and (layer.get_parameter(name).shape, layer.get_parameter(name).dtype) == (part.shape, part.dtype)
        for layer in sliced_linears(model).values()
        for name, part in zip(layer.slice_names, parts_of(layer.whole_weight, layer), strict=True)
    )
