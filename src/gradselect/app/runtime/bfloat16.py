"""A note where bfloat16 is slow."""

from __future__ import annotations

import torch
from torch import nn

from gradselect.core import SLOW_BFLOAT16, bfloat16_cost

LARGE_MODEL = 10_000_000
"""Weights in bfloat16 from which on a slow step is worth a note."""


def slow_bfloat16_note(model: nn.Module, device: str, *, advice: str) -> str | None:
    """Return a note if a large model in bfloat16 is to run on a CPU that computes it slowly; else None.

    A CPU without instructions for bfloat16 (AVX-512 BF16, AMX) takes several times as long as for float32, and most in
    the backward pass: torch has no fast kernel for it. What is measured decides, not the name of the processor.

    Args:
        model: the model, loaded.
        device: "cpu", or "auto" for an accelerator if there is one.
        advice: what to type.
    """
    if device not in ("auto", "cpu") or (device == "auto" and torch.accelerator.is_available()):
        return None
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype == torch.bfloat16)
    if count < LARGE_MODEL or (ratio := bfloat16_cost()) < SLOW_BFLOAT16:
        return None
    return (
        f"bfloat16 is slow on this processor: the matrix products of a step take {ratio:.0f} times as long as in "
        f"float32; {advice}"
    )
