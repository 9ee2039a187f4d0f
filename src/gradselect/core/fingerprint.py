"""Fingerprints of weights: they tell whether a run goes on with the weights that its state belongs to."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradselect.parallel import collective_device, is_dtensor, local_part, shard_groups, sum_over_ranks
from gradselect.usage import UsageError

logger = logging.getLogger(__name__)

Fingerprints = dict[str, list[Any]]
"""Dtype and fingerprint of each tensor, by name, as plain values."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}

MOST_NAMES = 5
"""Names that an error lists."""


@torch.no_grad()
def fingerprints(named: Iterable[tuple[str, Parameter]]) -> Fingerprints:
    """Sum the bit patterns of each tensor, as integers modulo 2^64.

    The sum is exact, and the same however a tensor is sharded. With shards every rank calls this. Tensors of special
    classes, such as quantised ones, are left out.

    Example:
        >>> weight = Parameter(torch.tensor([1.0, 2.0]))
        >>> fingerprints([("weight", weight)])
        {'weight': ['float32', 2139095040]}
    """
    tensors = {name: each for name, each in named if type(each) is Parameter or is_dtensor(each)}
    sums = {name: _bit_sum(local_part(each)) for name, each in tensors.items()}
    for groups in dict.fromkeys(map(shard_groups, tensors.values())):
        names = [name for name, each in tensors.items() if shard_groups(each) == groups]
        if groups:
            parts = torch.stack([sums[name] for name in names])
            totals = sum_over_ranks({groups: parts}, device=collective_device(tensors[names[0]]))
            sums |= dict(zip(names, totals, strict=True))
    return {name: [str(each.dtype).removeprefix("torch."), int(sums[name])] for name, each in tensors.items()}


def check_fingerprints(saved: Mapping[str, Any], named: Iterable[tuple[str, Parameter]]) -> None:
    """Check that the weights are those that were saved beside the state. Names that only one side has do not count.

    Raises:
        UsageError: names the tensors that differ.
    """
    ours = fingerprints(named)
    both = [name for name in ours if name in saved]
    other_dtype = [name for name in both if saved[name][0] != ours[name][0]]
    if other_dtype:
        name = other_dtype[0]
        logger.warning(
            "%d of %d weights have another dtype than in the checkpoint (%s: %s there, %s here): nothing can tell "
            "whether they were loaded",
            *(len(other_dtype), len(both), name, saved[name][0], ours[name][0]),
        )
    changed = [name for name in both if saved[name][0] == ours[name][0] and saved[name][1] != ours[name][1]]
    if changed:
        shown = ", ".join(changed[:MOST_NAMES]) + (", ..." if len(changed) > MOST_NAMES else "")
        raise UsageError(
            f"{len(changed)} of {len(both)} weights are not those that the checkpoint's optimizer state belongs to: "
            f"{shown}. They were not loaded, as happens silently where a checkpoint has other names than the model "
            "(transformers 5 renames weights of many models when it saves, and its Trainer loads by plain names). Load "
            "them with AutoModelForCausalLM.from_pretrained(<checkpoint folder>) and train that model; to go on from "
            "the weights as they are, call optimizer.refresh_masters()"
        )


def _bit_sum(tensor: Tensor) -> Tensor:
    """Sum of the bit patterns, shape (), int64."""
    return tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
