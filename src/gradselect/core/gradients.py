"""Norms of gradients, and the end of a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import Parameter

from gradselect.parallel import local_part
from gradselect.usage import UsageError


def gradient_norm(
    parameters: Sequence[Parameter], *, known: Mapping[Parameter, Tensor] = MappingProxyType({})
) -> Tensor:
    """L2 norm, in fp32, of the gradients of `parameters` taken as one vector; without any gradient 0.0. Shape ().

    Of sharded gradients it is that of the shards which this process holds.

    Args:
        parameters: those of one block, say.
        known: norms of single gradients that were measured already; the gradients may be gone.

    Raises:
        UsageError: a gradient is sparse.
    """
    norms = [
        known[parameter] if parameter in known else _norm_of(parameter)
        for parameter in parameters
        if parameter in known or parameter.grad is not None
    ]
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def _norm_of(parameter: Parameter) -> Tensor:
    """L2 norm, in fp32, of the one gradient, which exists. Shape ()."""
    assert parameter.grad is not None
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.linalg.vector_norm(dense(local_part(parameter.grad)), dtype=dtype).float()


def dense(gradient: Tensor) -> Tensor:
    """The gradient, which is not sparse.

    Raises:
        UsageError: it is.
    """
    if gradient.is_sparse:
        raise UsageError("sparse gradients are not supported; build the embedding with sparse=False")
    return gradient


def _at_end_of_pass(call: Callable[[], None]) -> None:
    """Queue a call for when the backward pass that runs now has visited everything, as data parallel wrappers do."""
    torch.autograd.Variable._execution_engine.queue_callback(call)  # pyright: ignore
