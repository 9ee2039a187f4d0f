"""Cost of bfloat16 on a CPU."""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor

SLOW_BFLOAT16 = 4.0
"""Multiple of the time of float32 from which on it is slow. Measured 14 to 22 on a processor with AVX2 alone, so chance
does not decide there; processors with instructions for bfloat16 were not measured by this."""
_ROWS, _WIDTH = 64, 256


@functools.cache
def bfloat16_cost() -> float:
    """Return the CPU time of the products of a linear layer's step in bfloat16, as a multiple of that in float32.

    Measured on one thread, once in a process: a few milliseconds, or a tenth of a second where bfloat16 is slow.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other on a busy machine, and their waiting counts
    try:
        return _seconds(torch.bfloat16) / _seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _seconds(dtype: torch.dtype) -> float:
    inputs, weight = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    grad = torch.ones(_ROWS, _WIDTH, dtype=dtype)
    _step(inputs, weight, grad)  # the first call also chooses kernels
    times = []
    for _ in range(5):
        start = time.process_time()  # other processes do not count
        _step(inputs, weight, grad)
        times.append(time.process_time() - start)
    return min(times)


def _step(inputs: Tensor, weight: Tensor, grad: Tensor) -> None:
    """Compute outputs, gradient of the inputs and gradient of the weight, as a linear layer does."""
    torch.nn.functional.linear(inputs, weight)
    torch.mm(grad, weight)
    torch.mm(grad.t(), inputs)
