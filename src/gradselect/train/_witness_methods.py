"""Methods of other packages, as outside witnesses."""

from __future__ import annotations

import torch


def witness_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """Bytes of masters, of the masters' gradients and of other state of an optimizer that is none of ours."""
    tensors = [value for entries in optimizer.state.values() for value in entries.values() if torch.is_tensor(value)]
    # Step counters of a few bytes are not counted, as in `BlockOptimizer.memory`.
    return 0, 0, sum(value.numel() * value.element_size() for value in tensors if value.ndim > 0)
