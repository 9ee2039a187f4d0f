"""The choice of SPT: adapter, mask, or the whole tensor, within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradselect.entries import GlobalTopK, Indices, MaskTensor, Shards, chunk_length, share_out


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A tensor that SPT may train.

    Attributes:
        tensor: the tensor.
        form: form in which it trains as a whole: "adapter" for a matrix, "whole" for a vector; None: its entries only.
        cost: number of entries that train in that form.
        share: share of `cost` that must be among the most sensitive entries for it.

    Example:
        >>> from torch.nn import Identity, Parameter
        >>> bias = MaskTensor(name="bias", parameter=Parameter(torch.zeros(10)), module=Identity())
        >>> candidate = Candidate(tensor=bias, form="whole", cost=10, share=0.2)
        >>> candidate.num_trained(1), candidate.num_trained(2)
        (1, 10)
    """

    tensor: MaskTensor
    form: Literal["adapter", "whole"] | None
    cost: int
    share: float

    def is_dense(self, count: int) -> bool:
        """Return True if the tensor trains in its form when `count` of its entries are among the most sensitive."""
        # Rounded: 0.2 * 15 is above 3 as a float.
        return self.form is not None and count > 0 and count >= round(self.share * self.cost, 9)

    def num_trained(self, count: int) -> int:
        """Return the number of entries that train then."""
        return self.cost if self.is_dense(count) else count


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Form in which each tensor trains.

    Attributes:
        budget: number of entries to train.
        adapters: names of the matrices that get an adapter.
        whole: names of the vectors that train whole.
        entries: flat indices of the entries that train by a mask, by name of their tensor.
        num_adapter_entries: entries of all adapters.
        num_whole: entries of the vectors that train whole.
        num_candidates: number of tensors that were looked at.

    Example:
        >>> nothing = {"adapters": (), "num_adapter_entries": 0, "num_candidates": 1}
        >>> choice = Choice(budget=3, whole=("bias",), num_whole=2, entries={"weight": torch.tensor([5])}, **nothing)
        >>> choice.num_trained
        3
    """

    budget: int
    adapters: tuple[str, ...]
    whole: tuple[str, ...]
    entries: Indices
    num_adapter_entries: int
    num_whole: int
    num_candidates: int

    @property
    def num_masked(self) -> int:
        """Number of entries that train by a mask."""
        return sum(map(len, self.entries.values()))

    @property
    def num_trained(self) -> int:
        """Number of entries that train, in adapters, vectors and masks."""
        return self.num_adapter_entries + self.num_whole + self.num_masked

    def describe(self) -> str:
        """Return the choice as one line with numbers."""
        matrices = len(self.adapters)
        return (
            f"SPT trains {self.num_trained:,} entries of a budget of {self.budget:,}: {self.num_adapter_entries:,} in "
            f"adapters of {matrices:,} {'matrix' if matrices == 1 else 'matrices'}, {self.num_whole:,} in "
            f"{len(self.whole):,} whole vectors, {self.num_masked:,} by a mask on {len(self.entries):,} tensors; "
            f"{self.num_candidates:,} tensors were looked at"
        )


def choose(candidates: Sequence[Candidate], scores: Mapping[str, Tensor], *, budget: int) -> Choice:
    r"""Choose how each candidate trains, so that `budget` entries train.

    For a threshold t let k_i(t) be the number of entries of candidate i of score at least t, and

        n_i(t) = cost_i    if k_i(t) >= share_i cost_i,   else k_i(t)

    t is the smallest threshold with sum_i n_i(t) <= budget. Candidates that are dense at t train in their form. The
    rest of the budget goes to the entries of largest score of the other candidates, ties to the earlier tensor, then
    to the lower index. Entries of score 0 or less never train. `reference.spt_choice` is the twin that sorts all.

    Args:
        candidates: in model order.
        scores: by name of the tensor, in its shape, float32 or wider; ranked as float32.
        budget: number of entries to train.

    Example:
        >>> from torch.nn import Identity, Parameter
        >>> bias = MaskTensor(name="bias", parameter=Parameter(torch.zeros(4)), module=Identity())
        >>> candidate = Candidate(tensor=bias, form=None, cost=0, share=0.2)
        >>> choose([candidate], {"bias": torch.tensor([0.5, 3.0, 0.0, 1.0])}, budget=2).entries
        {'bias': tensor([1, 3])}
    """
    flat = [scores[candidate.tensor.name].detach().reshape(-1).float() for candidate in candidates]
    threshold = _smallest_threshold(candidates, flat, budget)
    is_dense = [
        candidate.is_dense(_count(values, threshold)) for candidate, values in zip(candidates, flat, strict=True)
    ]
    dense = [candidate for candidate, is_whole in zip(candidates, is_dense, strict=True) if is_whole]
    num_left = budget - sum(candidate.cost for candidate in dense)
    others = {
        candidate.tensor.name: (candidate.tensor, values)
        for candidate, values, is_whole in zip(candidates, flat, is_dense, strict=True)
        if not is_whole
    }
    adapters, whole = ([each for each in dense if each.form == form] for form in ("adapter", "whole"))
    return Choice(
        budget=budget,
        adapters=tuple(candidate.tensor.name for candidate in adapters),
        whole=tuple(candidate.tensor.name for candidate in whole),
        entries=_best(others, num_left),
        num_adapter_entries=sum(candidate.cost for candidate in adapters),
        num_whole=sum(candidate.cost for candidate in whole),
        num_candidates=len(candidates),
    )


def possible_choice(candidates: Sequence[Candidate], *, budget: int, with_adapters: bool) -> Choice:
    """Return a choice that scores might give: as many adapters as the budget pays, or none and no whole vector.

    Entries are shared out among the other tensors in proportion to their sizes.

    Args:
        candidates: in model order.
        budget: number of entries to train.
        with_adapters: which of the two.

    Example:
        >>> from torch.nn import Identity, Parameter
        >>> bias = MaskTensor(name="bias", parameter=Parameter(torch.zeros(4)), module=Identity())
        >>> candidate = Candidate(tensor=bias, form="whole", cost=4, share=0.2)
        >>> possible_choice([candidate], budget=2, with_adapters=False).entries
        {'bias': tensor([0, 1])}
    """
    adapted, left = [], budget
    smallest_first = sorted((each for each in candidates if each.form == "adapter"), key=lambda each: each.cost)
    for each in smallest_first if with_adapters else ():
        if each.cost <= left:
            adapted.append(each)
            left -= each.cost
    names = {each.tensor.name for each in adapted}
    others = [each.tensor for each in candidates if each.tensor.name not in names]
    counts = share_out(others, min(left, sum(tensor.numel for tensor in others))) if others else {}
    return Choice(
        budget=budget,
        adapters=tuple(each.tensor.name for each in candidates if each.tensor.name in names),
        whole=(),
        entries={name: torch.arange(count) for name, count in counts.items() if count},
        num_adapter_entries=budget - left,
        num_whole=0,
        num_candidates=len(candidates),
    )


def _smallest_threshold(candidates: Sequence[Candidate], scores: Sequence[Tensor], budget: int) -> float:
    """Return the smallest positive threshold at which at most `budget` entries train.

    The number that trains never rises with the threshold, because a form costs at least the entries that it takes to
    get it. Positive floats have the order of their bits read as integers, so 31 halvings find the exact value.
    """
    low, high = 1, _as_bits(float("inf")) + 1  # the smallest positive float, and NaN, which no score reaches
    while low < high:
        middle = (low + high) // 2
        threshold = _as_float(middle)
        counts = [_count(values, threshold) for values in scores]
        total = sum(each.num_trained(count) for each, count in zip(candidates, counts, strict=True))
        if total <= budget:
            high = middle
        else:
            low = middle + 1
    return _as_float(low)


def _count(scores: Tensor, threshold: float) -> int:
    return sum(int((chunk >= threshold).count_nonzero()) for chunk in scores.split(chunk_length(scores)))


def _as_bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


def _as_float(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _best(tensors: Mapping[str, tuple[MaskTensor, Tensor]], count: int) -> Indices:
    """Return flat indices of the `count` entries of largest positive score, by tensor; those without any left out."""
    names = tuple(tensors)
    shards = Shards({name: tensor.parameter for name, (tensor, _) in tensors.items()})
    top_k = GlobalTopK(names, shards, count, above=0.0)
    for position, (name, (_, values)) in enumerate(tensors.items()):
        offset = 0
        for chunk in values.split(chunk_length(values)):
            top_k.top(name).add(chunk, position=position, offset=offset)
            offset += chunk.numel()
    found = top_k.result() if names else {}
    return {name: indices for name, (indices, _) in found.items() if len(indices)}
