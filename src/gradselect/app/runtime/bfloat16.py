"""Products in bfloat16 on a CPU that has no instructions for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradselect.core import SLOW_BFLOAT16, bfloat16_cost

LARGE_MODEL = 10_000_000
"""Weights in bfloat16 from which on a step takes long enough to matter."""
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
"""Operators of torch that hold nearly all time of a step: those of linear layers and of attention."""


@contextmanager
def fast_bfloat16(model: nn.Module, device: str) -> Iterator[str | None]:
    """Compute the products of a large model in bfloat16 through float32, on a CPU that is slow in bfloat16.

    Without AVX-512 BF16 or AMX torch has no fast kernel for bfloat16: a step took 16 times as long as in float32
    (LOG.md). Inputs are converted, the kernel of float32 runs, and the result is rounded to bfloat16, which is what the
    definition asks for: kernels of bfloat16 add up in float32 too, in another order. What is measured decides, not the
    name of the processor. On leaving, torch's own kernels are back.

    Args:
        model: the model, loaded.
        device: "cpu", or "auto" for an accelerator if there is one.

    Yields:
        A note for the user; None where nothing was to be done.
    """
    ratio = _ratio(model, device)
    if ratio is None:
        yield None
        return
    with through_float32():
        yield (
            f"on this processor matrix products take {ratio:.0f} times as long in bfloat16 as in float32: they go "
            "through float32, and each result is rounded to bfloat16"
        )


@contextmanager
def through_float32() -> Iterator[None]:
    """Let the CPU's products of tensors that are all bfloat16 run in float32. Other products do not change.

    Example:
        >>> left, right = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(3, 2, dtype=torch.bfloat16)
        >>> with through_float32():
        ...     (left @ right).dtype
        torch.bfloat16
    """
    library = torch.library.Library("aten", "IMPL")
    for name in PRODUCTS:
        kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel of torch is replaced
            library.impl(name, _converting(kernel.call_boxed), "CPU", with_keyset=True, allow_override=True)
    try:
        yield
    finally:
        del library  # the last reference: torch takes its kernels back


def _converting(kernel: Callable[..., Any]) -> Callable[..., Tensor]:
    def product(keys: Any, *tensors: Tensor, **factors: float) -> Tensor:
        if all(tensor.dtype == torch.bfloat16 for tensor in tensors):
            return kernel(keys, *(tensor.float() for tensor in tensors), **factors).to(torch.bfloat16)
        return kernel(keys, *tensors, **factors)

    return product


def _ratio(model: nn.Module, device: str) -> float | None:
    """Return how many times as long products take in bfloat16; None if they are fast or few, or not on a CPU."""
    if device not in ("auto", "cpu") or (device == "auto" and torch.accelerator.is_available()):
        return None
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype == torch.bfloat16)
    return ratio if count >= LARGE_MODEL and (ratio := bfloat16_cost()) >= SLOW_BFLOAT16 else None
