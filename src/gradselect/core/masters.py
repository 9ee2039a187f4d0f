"""Master weights that follow their weights when something else than the optimizer has changed those."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from gradselect.parallel import local_part
from gradselect.usage import UsageError

from .rules import State

MASTER = "master"

HALF = (torch.bfloat16, torch.float16)
"""Dtypes of weights that may have a master."""

SAMPLES = 64
"""Values of each tensor that are compared with its master at every step."""


class MasterWatch:
    """Finds weights that are no longer their masters, rounded: a loaded checkpoint, an average, a reset.

    A write through the parameter raises its version counter; then all values are compared. A write through `.data` does
    not, so `SAMPLES` evenly spaced values of each tensor are compared at every step too. Only values that differ are
    taken over, so the others keep the digits that their weights cannot hold.
    """

    def __init__(self) -> None:
        self._versions: dict[Tensor, int] = {}

    def wrote(self, parameter: Parameter) -> None:
        """Note that the optimizer itself has just written the weight."""
        self._versions[parameter] = local_part(parameter)._version

    def follow(self, masters: Mapping[Parameter, Tensor]) -> list[Parameter]:
        """Take over weights that others have changed; return the parameters where something differed."""
        written = [each for each in masters if self._versions.get(each) != local_part(each)._version]
        if len(written) < len(masters) and not _agree_in_samples(masters):
            written = list(masters)
        changed = [each for each in written if not agrees(local_part(each), masters[each])]
        for parameter in changed:
            take_over(local_part(parameter), masters[parameter])
        for parameter in written:
            self.wrote(parameter)
        return changed

    def forget(self) -> None:
        """Compare all values at the next step."""
        self._versions.clear()


def check_master(name: str, state: State, parameter: Parameter, *, master_dtype: torch.dtype | None) -> None:
    """Check that a saved state has the master that this run would have made.

    Raises:
        UsageError: it is missing or has another dtype.
    """
    if not state or parameter.dtype not in HALF:
        return
    theirs = state[MASTER].dtype if MASTER in state else None
    if theirs != master_dtype:
        raise UsageError(
            f"the checkpoint was written with master_dtype={theirs} and this run has master_dtype="
            f"{master_dtype} ({name!r} is {parameter.dtype}); write master_dtype={theirs}"
        )


def take_over(weight: Tensor, master: Tensor) -> None:
    """Set a master to its weight where the two differ."""
    master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.to(master.dtype)))


def unrounded(weight: Tensor, master: Tensor) -> None:
    """Give a weight that is in half precision no longer the digits of its master, where it is still that, rounded."""
    is_rounded = torch.stack([master.to(dtype).to(weight.dtype) == weight for dtype in HALF]).any(0)
    weight.copy_(torch.where(is_rounded, master.to(weight.dtype), weight))


def agrees(weight: Tensor, master: Tensor) -> bool:
    """True if the weight is its master, rounded. Bits are compared: a NaN that the optimizer wrote is its own."""
    return torch.equal(weight.view(torch.int16), master.to(weight.dtype).view(torch.int16))


def _agree_in_samples(masters: Mapping[Parameter, Tensor]) -> bool:
    pairs = [(_sampled(local_part(parameter)), _sampled(master)) for parameter, master in masters.items()]
    weights, others = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return agrees(weights, others)


def _sampled(tensor: Tensor) -> Tensor:
    flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)]


def packed(weight: Tensor) -> Tensor:
    """Return the weight, or a copy in memory of its own if it is a strided part of a larger tensor.

    Fused kernels walk through memory and would write to the rest of that tensor; loops are slower on strided memory.
    """
    return weight.detach().contiguous() if is_strided(weight) else weight


def is_strided(weight: Tensor) -> bool:
    """True if there are gaps between the entries of the weight: it is a part of a larger tensor, such as columns."""
    return not weight.is_contiguous() and torch.empty_like(weight, device="meta").stride() != weight.stride()
