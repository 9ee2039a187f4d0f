"""Reflections and projections along unit normals of blocks, without a dense matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import Parameter, functional

from gradselect.usage import UsageError


def new_normals(size: int, num_blocks: int) -> Parameter:
    """Return random normals, not of unit length: one row for each block of `size` numbers.

    Args:
        size: numbers of the vectors that are changed.
        num_blocks: blocks; it divides the size.
    """
    normals = Parameter(torch.empty(num_blocks, size // num_blocks))
    nn.init.kaiming_uniform_(normals, a=math.sqrt(5))
    return normals


def check_blocks(num_blocks: int, path: str, **sizes: int) -> None:
    """Check that blocks divide each size of a layer, and hold at least two numbers each.

    A unit normal of a single number is 1 or -1 and has no gradient. A layer of a single input or output is let through.

    Args:
        num_blocks: blocks.
        path: name of the layer.
        sizes: its sizes by what they count: `inputs`, `outputs`.

    Raises:
        UsageError: they do not; names the nearest number that does.
    """
    for what, size in sizes.items():
        if not _fits(num_blocks, size):
            fault = "leaves one number a block, which cannot train, of" if size == num_blocks else "does not divide"
            common = math.gcd(*sizes.values())
            fitting = (number for number in range(1, common + 1) if all(_fits(number, each) for each in sizes.values()))
            nearest = max(number for number in fitting if number <= num_blocks)
            raise UsageError(
                f"num_blocks={num_blocks} {fault} the {size} {what} of {path!r}; write num_blocks={nearest}"
            )


def _fits(num_blocks: int, size: int) -> bool:
    return size % num_blocks == 0 and (size == 1 or size > num_blocks)


def along(x: Tensor, units: Tensor) -> Tensor:
    """Return the part of each block of `x` that lies along the block's unit normal.

    Args:
        x: (..., blocks x size).
        units: (blocks, size), of length 1.
    """
    shares = torch.einsum("...bs,bs->...b", x.unflatten(-1, units.shape), units)
    return (shares.unsqueeze(-1) * units).flatten(-2)


def unit(normals: Tensor) -> Tensor:
    """Return the normals with length 1."""
    return functional.normalize(normals, dim=-1)
