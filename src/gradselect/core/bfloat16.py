"""Cost of bfloat16 on a CPU."""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor

SLOW_BFLOAT16 = 2.0
"""Multiple of the time of float32 from which on it is slow."""
_ROWS, _WIDTH = 64, 256


@functools.cache
def bfloat16_cost() -> float:
    """Return the time of the three products of a linear layer's step in bfloat16, as a multiple of that in float32.

    Measured on the CPU, once in a process: a few milliseconds, or a tenth of a second where bfloat16 is slow.
    """
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    inputs, weight = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    grad = torch.ones(_ROWS, _WIDTH, dtype=dtype)
    _step(inputs, weight, grad)  # the first call also chooses kernels
    times = []
    for _ in range(3):
        start = time.perf_counter()
        _step(inputs, weight, grad)
        times.append(time.perf_counter() - start)
    return min(times)


def _step(inputs: Tensor, weight: Tensor, grad: Tensor) -> None:
    """Compute outputs, gradient of the inputs and gradient of the weight, as a linear layer does."""
    torch.nn.functional.linear(inputs, weight)
    torch.mm(grad, weight)
    torch.mm(grad.t(), inputs)
