"""GMT: the entries of largest gradient, selected at each step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from gradselect.core import HALF
from gradselect.entries import AbstractDenseMask, chunk_length
from gradselect.parallel import Groups, collective_device, local_part, shard_groups, sum_over_ranks
from gradselect.usage import check_one_of, check_positive

DIGIT_BITS = 16
SAMPLE = 1 << 12
"""Size of the sample that estimates the threshold."""


@final
@dataclass(eq=False, kw_only=True)
class GMT(AbstractDenseMask):
    r"""Select the entries whose |g| is at least the k-th largest, k = max(1, round(fraction * entries)).

        mask_i = |g_i| >= tau,    tau the k-th largest |g|

    g is the gradient of the whole step, accumulated over its micro-batches. All entries that tie with the k-th are
    selected, so the result depends on no order. This can give more than k entries. If fewer than k gradients are
    nonzero (an embedding), all entries are selected. NaN is never selected. The threshold is exact and needs no copy
    of the gradients. The optimizer state is that of dense AdamW: the method reduces the movement of the weights, not
    memory.

    Args:
        fraction: share of the entries to select, in (0, 1]. Default 0.2, our choice: third parties quote the paper with
            0.2 and with 0.7.
        scope: "tensor": the k largest of each tensor; "global": of all tensors together. The paper leaves this open.
            Default "tensor", our choice.
        mask: "gradient": the other entries get a gradient of zero, so their moments decay and they still move a little.
            "update": moments see the whole gradient, and the other entries do not move. Default "gradient", our choice.
        among: names or globs of the parameters to mask. None: all.

    Raises:
        UsageError: a fraction outside (0, 1], an unknown scope or mask.

    Example:
        >>> mask = GMT(fraction=0.2)

    Reference: Li et al., "Gradient-Mask Tuning Elevates the Upper Limits of LLM Performance", arXiv 2406.15330.
    """

    method_name = "gmt"

    fraction: float = 0.2
    scope: Literal["tensor", "global"] = "tensor"

    def __post_init__(self) -> None:
        check_positive("fraction", self.fraction, at_most=1, example=0.2)
        check_one_of("scope", self.scope, ("tensor", "global"))
        check_one_of("mask", self.mask, ("gradient", "update"))

    def start(self) -> None:
        pass

    def masks(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        groups = [gradients] if self.scope == "global" else [[gradient] for gradient in gradients]
        return [mask for group in groups if group for mask in self._masks(group)]

    def _masks(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        count = max(1, round(self.fraction * sum(gradient.numel() for gradient in gradients)))
        threshold = kth_largest_magnitude(gradients, count)
        # Two comparisons instead of |g|: they allocate one byte per entry, not a copy of the gradients.
        return [(gradient >= threshold) | (gradient <= -threshold) for gradient in map(local_part, gradients)]


def kth_largest_magnitude(tensors: Sequence[Tensor], count: int) -> float:
    """Return the exact `count`-th largest |x| among all entries of `tensors`; NaN counts as 0.

    A sample gives two values around it. Then counting the entries above and sorting those between is enough. The value
    is found digit by digit instead if the sample was wrong, many entries tie, or ranks hold parts of the tensors; on
    the CPU in half precision too, where one digit is the whole value.
    """
    is_one_digit = common_dtype(tensors).itemsize * 8 == DIGIT_BITS
    if any(map(shard_groups, tensors)) or (is_one_digit and all(tensor.device.type == "cpu" for tensor in tensors)):
        return kth_largest_by_digits(tensors, count)
    low, high = bracket(tensors, count)
    num_above, between = 0, []
    for chunk in magnitudes(tensors):
        at_least = chunk >= low
        above = chunk > high
        num_above += int(above.count_nonzero())
        between.append(chunk[at_least ^ above])
    candidates = torch.cat([part.to(between[0].device) for part in between])
    rank = count - num_above
    if 1 <= rank <= candidates.numel():
        return float(torch.topk(candidates, rank, sorted=True).values[-1])
    return kth_largest_by_digits(tensors, count)


def bracket(tensors: Sequence[Tensor], count: int) -> tuple[float, float]:
    """Return two values between which the `count`-th largest |x| most probably lies; for few entries, 0 and inf."""
    total = sum(tensor.numel() for tensor in tensors)
    stride = total // SAMPLE
    if stride < 2:
        return 0.0, math.inf
    strided = [tensor.detach().reshape(-1)[::stride] for tensor in tensors]
    sample = torch.cat([chunk.cpu() for chunk in magnitudes(strided)])
    share = count / total
    # Four standard deviations of the sample's quantile.
    margin = 4 * math.sqrt(share * (1 - share) / len(sample)) * len(sample) + 1
    first, last = math.floor(share * len(sample) - margin), math.ceil(share * len(sample) + margin)
    return (
        float(sample.kthvalue(len(sample) - last).values) if last < len(sample) else 0.0,
        float(sample.kthvalue(len(sample) - first).values) if first >= 0 else math.inf,
    )


def kth_largest_by_digits(tensors: Sequence[Tensor], count: int) -> float:
    """Return the `count`-th largest |x| of all ranks, from counts only.

    Non-negative floats have the same order as their bits read as integers. So this is a radix select of 16 bits per
    pass, leading bits first: among the entries that match the digits found so far, count each value of the next digit.
    """
    dtype = common_dtype(tensors)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    leading = 8 * dtype.itemsize - DIGIT_BITS
    known = 0
    for shift in range(leading, -1, -DIGIT_BITS):
        by_groups: dict[Groups, Tensor] = {}
        for tensor in tensors:
            counts = by_groups.setdefault(shard_groups(tensor), torch.zeros(1 << DIGIT_BITS, dtype=torch.int64))
            for chunk in magnitudes([local_part(tensor)]):
                bits = chunk.to(dtype).view(integer)
                if shift == leading:
                    digits = bits >> shift
                else:
                    digits = bits[bits >> (shift + DIGIT_BITS) == known] >> shift & ((1 << DIGIT_BITS) - 1)
                counts += torch.bincount(digits, minlength=len(counts)).cpu()
        counts = sum_over_ranks(by_groups, device=collective_device(tensors[0]))
        at_least = counts.flip(0).cumsum(0).flip(0)  # entries whose digit is at least this one
        digit = int((at_least >= count).sum()) - 1
        count -= int(at_least[digit] - counts[digit])
        known = known << DIGIT_BITS | digit
    return torch.tensor(known, dtype=integer).view(dtype).item()


def magnitudes(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield |x| chunk by chunk, with 0 for NaN."""
    dtype = common_dtype(tensors)
    for tensor in tensors:
        for chunk in tensor.detach().reshape(-1).split(chunk_length(tensor)):
            yield chunk.to(dtype).abs().nan_to_num_(nan=0.0, posinf=torch.inf)


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return a dtype that represents every entry exactly."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1 and dtypes.issubset(HALF):
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32
