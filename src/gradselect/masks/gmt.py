"""GMT: at each step only the entries of large gradient count."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from gradselect.entries import AbstractDenseMask, chunk_length
from gradselect.parallel import Groups, add_up, collective_device, local_part, shard_groups
from gradselect.usage import check_one_of, check_positive

DIGIT_BITS = 16
SAMPLE = 1 << 12
"""Entries from which the threshold is first guessed."""


@final
@dataclass(eq=False, kw_only=True)
class GMT(AbstractDenseMask):
    r"""Keep the entries whose |g| is at least the k-th largest, k = max(1, round(fraction * entries)).

        mask_i = |g_i| >= tau,    tau the k-th largest |g|

    g is the gradient of the whole step, accumulated over its micro-batches. Entries that tie with the k-th are all
    kept, so the answer depends on no order; a few more than k are then kept, and where fewer than k gradients differ
    from zero (an embedding) all are. NaN is never kept. The threshold is exact, and found without a copy of the
    gradients. The state of the optimizer is that of AdamW, dense: the method saves movement of the weights, not memory.

    Args:
        fraction: share of the entries that is kept, in (0, 1]. Default 0.2. Third parties quote the paper with 0.2 and
            with 0.7; the default is our choice.
        scope: "tensor": the k largest of each tensor; "global": of all tensors together. The paper leaves this open;
            the default "tensor" is our choice.
        mask: "gradient": entries that are not kept have a gradient of zero, so their moments fade and they still move a
            little; "update": their moments see the whole gradient, and they stay. The default "gradient" is our choice.
        among: names or globs of parameters to put the mask on; None: all.

    Raises:
        UsageError: a fraction outside (0, 1], another scope or mask.

    Example:
        >>> mask = GMT(fraction=0.2)

    Reference: Li et al., "Gradient-Mask Tuning Elevates the Upper Limits of LLM Performance", arXiv 2406.15330.
    """

    fraction: float = 0.2
    scope: Literal["tensor", "global"] = "tensor"

    def __post_init__(self) -> None:
        check_positive("fraction", self.fraction, at_most=1, example=0.2)
        check_one_of("scope", self.scope, ("tensor", "global"))
        check_one_of("mask", self.mask, ("gradient", "update"))

    def start(self) -> None:
        pass

    def masks(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        together = [gradients] if self.scope == "global" else [[gradient] for gradient in gradients]
        return [mask for group in together if group for mask in self._masks(group)]

    def _masks(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        count = max(1, round(self.fraction * sum(gradient.numel() for gradient in gradients)))
        threshold = kth_largest_magnitude(gradients, count)
        # Two comparisons and no |g|: bytes are made, not a copy of the gradients.
        return [(gradient >= threshold) | (gradient <= -threshold) for gradient in map(local_part, gradients)]


def kth_largest_magnitude(tensors: Sequence[Tensor], count: int) -> float:
    """The `count`-th largest |x| among all entries of `tensors`, exactly; NaN counts as 0.

    A sample says between which two values it lies; then it is enough to count the entries above and to sort those
    between. Where the sample was wrong, many entries tie or several processes hold parts of the tensors, the value is
    found digit by digit.
    """
    if any(map(shard_groups, tensors)):
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
    """Two values between which the `count`-th largest |x| most probably lies; of few entries, all of them."""
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
    """The same, from counts alone.

    Non-negative floats are ordered as their bits, read as whole numbers, are. So the value is found 16 bits at a time,
    the leading ones first: of the entries that agree in the digits known so far, how many have each value of the next.
    """
    dtype = common_dtype(tensors)
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    leading = 8 * dtype.itemsize - DIGIT_BITS
    known = 0
    for shift in range(leading, -1, -DIGIT_BITS):
        of_kinds: dict[Groups, Tensor] = {}
        for tensor in tensors:
            counts = of_kinds.setdefault(shard_groups(tensor), torch.zeros(1 << DIGIT_BITS, dtype=torch.int64))
            for chunk in magnitudes([local_part(tensor)]):
                bits = chunk.to(dtype).view(integer)
                candidates = bits if shift == leading else bits[bits >> (shift + DIGIT_BITS) == known]
                digits = candidates >> shift & ((1 << DIGIT_BITS) - 1)
                counts += torch.bincount(digits, minlength=len(counts)).cpu()
        counts = add_up(of_kinds, device=collective_device(tensors[0]))
        at_least = counts.flip(0).cumsum(0).flip(0)  # entries whose digit is at least this one
        digit = int((at_least >= count).sum()) - 1
        count -= int(at_least[digit] - counts[digit])
        known = known << DIGIT_BITS | digit
    return torch.tensor(known, dtype=integer).view(dtype).item()


def magnitudes(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """|x|, chunk by chunk, with 0 for NaN."""
    dtype = common_dtype(tensors)
    for tensor in tensors:
        for chunk in tensor.detach().reshape(-1).split(chunk_length(tensor)):
            yield chunk.to(dtype).abs().nan_to_num_(nan=0.0, posinf=torch.inf)


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """One in which every entry is exact."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
