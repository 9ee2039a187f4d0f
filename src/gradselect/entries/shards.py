"""Shards of entries: their indices in whole tensors, sums over ranks, and the global top-k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gradselect.parallel import (
    collective_device,
    local_part,
    local_start,
    naming_the_collective,
    shard_groups,
    sum_over_ranks,
)

from .top_k import INDEX_BITS, Candidates

DIGIT_BITS = 8
NUM_DIGITS = 1 << DIGIT_BITS
SIGN_BIT = torch.iinfo(torch.int64).min
LARGEST = torch.iinfo(torch.int64).max


class Shards:
    """Entries of named tensors in this rank's local parts, and sums over the other ranks.

    A tensor that is whole on every rank needs no communication: all ranks find the same.

    Args:
        tensors: by name, in model order; keys of a top-k hold a tensor's position in it.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._groups = {name: shard_groups(tensor) for name, tensor in tensors.items()}
        self._first = {name: local_start(tensor, name=name) for name, tensor in tensors.items()}
        self._sizes = {name: local_part(tensor).numel() for name, tensor in tensors.items()}
        self._shardings = tuple(dict.fromkeys(self._groups.values()))
        self._device = next((collective_device(t) for t in tensors.values() if shard_groups(t)), torch.device("cpu"))
        self.is_split = any(self._groups.values())

    def total(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """Sum numbers of local parts over all ranks, by tensor."""
        if not self.is_split:
            return dict(numbers)
        by_sharding = {
            groups: torch.tensor([numbers.get(name, 0) * (ours == groups) for name, ours in self._groups.items()])
            for groups in self._shardings
        }
        totals = sum_over_ranks(by_sharding, device=self._device)
        return {name: total for name, total in zip(self._groups, totals.tolist(), strict=True) if name in numbers}

    def to_local(self, name: str, indices: Tensor) -> Tensor:
        """Convert indices in the whole tensor to indices in the local part; drop those of other ranks."""
        if not self._groups[name]:
            return indices
        local = indices - self._first[name]
        return local[(local >= 0) & (local < self._sizes[name])]

    def to_whole(self, name: str, local: Tensor) -> Tensor:
        """Convert indices in the local part to indices in the whole tensor, int64."""
        return local.long() + self._first[name]

    def gather_state(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gather the state of a tensor's entries (see `EntryStore.state`) from all ranks, by index in the whole tensor.

        Entries are in the order in which they joined, those of one cohort by index. On the CPU if ranks were gathered.
        """
        parts = [{key: value.cpu() for key, value in state.items()}] if self._groups[name] else []
        for part in parts:
            part["indices"] = self.to_whole(name, part["indices"])
        for group in self._groups[name]:
            everyone: list[list[dict[str, Tensor]]] = [[] for _ in range(group.size())]
            with naming_the_collective(f"gathering the state of {name}"):
                dist.all_gather_object(everyone, parts, group=group)
            parts = [part for several in everyone for part in several]
        return _joined(parts) if parts else state

    def local_state(self, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's part of the gathered state."""
        if not self._groups[name]:
            return dict(state)
        local = state["indices"].long() - self._first[name]
        is_local = (local >= 0) & (local < self._sizes[name])
        parts = {**state, "indices": local}
        return {key: value[is_local] if value.ndim else value for key, value in parts.items()}

    def global_top_k(self, candidates: Sequence[Candidates], counts: Sequence[int]) -> list[Candidates]:
        """Global top-k, several at once. Returns the winners that this rank holds.

        Ranks exchange no scores. Each counts its candidates by one digit of the score, eight bits at a time, and the
        counts are summed over ranks. Ties go to the earlier tensor, then to the lower index in the whole tensor, as on
        a single rank.

        Args:
            candidates: this rank's top-k, one for each k.
            counts: the k of each.
        """
        device = next((keys.device for _, keys, _ in candidates if keys.numel()), torch.device("cpu"))
        scores = torch.cat([scores.to(device, torch.float64) for scores, _, _ in candidates])
        keys = torch.cat([keys.to(device) for _, keys, _ in candidates])
        which = torch.cat([torch.full((len(keys),), n, device=device) for n, (_, keys, _) in enumerate(candidates)])
        wins, ties, wanted, num_ties = self._largest(ordered_bits(scores), keys, which, torch.tensor(counts))
        if bool((num_ties > wanted).any()):
            tied = ties.nonzero().view(-1)
            codes = ordered_by_key(self._whole_keys(keys[tied]))
            first, last, _, _ = self._largest(codes, keys[tied], which[tied], wanted)
            ties = torch.zeros_like(ties).index_put_((tied,), first | last)
        winners = (wins | ties).split([len(keys) for _, keys, _ in candidates])
        return [
            (scores[won.to(scores.device)], keys[won.to(keys.device)], values[won.to(values.device)])
            for won, (scores, keys, values) in zip(winners, candidates, strict=True)
        ]

    def _largest(
        self, codes: Tensor, keys: Tensor, which: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find the `wanted` largest codes of each top-k over all ranks, codes read as unsigned numbers.

        Args:
            codes: shape (n,), of this rank.
            keys: shape (n,).
            which: number of the top-k of each code. Shape (n,).
            wanted: k of each top-k.

        Returns:
            True for codes above the k-th largest; True for codes equal to it; by top-k, the number of equal codes that
            are wanted; and the number that exist, both over all ranks.
        """
        shardings = [self._shardings.index(groups) for groups in self._groups.values()]
        cells = torch.tensor(shardings, device=keys.device)[keys >> INDEX_BITS] * len(wanted) + which
        wins, ties = torch.zeros_like(codes, dtype=torch.bool), torch.ones_like(codes, dtype=torch.bool)
        num_ties = torch.zeros_like(wanted)
        for shift in range(64 - DIGIT_BITS, -1, -DIGIT_BITS):
            digits = codes >> shift & (NUM_DIGITS - 1)
            counts = self._counts((cells * NUM_DIGITS + digits)[ties], len(wanted))
            at_least = counts.flip(1).cumsum(1).flip(1)
            wanted = torch.minimum(wanted, at_least[:, 0])
            last = (at_least >= wanted[:, None]).sum(1, keepdim=True) - 1
            num_ties = counts.gather(1, last).view(-1)
            wanted = wanted - at_least.gather(1, last).view(-1) + num_ties
            limits = last.view(-1).to(codes.device)[which]
            wins |= ties & (digits > limits)
            ties &= digits == limits
        return wins, ties, wanted, num_ties

    def _counts(self, bins: Tensor, num_top_ks: int) -> Tensor:
        """Number of codes with each digit, over all ranks. Shape (num_top_ks, NUM_DIGITS), on the CPU."""
        shape = (len(self._shardings), num_top_ks, NUM_DIGITS)
        counts = torch.bincount(bins, minlength=shape[0] * shape[1] * shape[2]).view(shape)
        return sum_over_ranks(dict(zip(self._shardings, counts.unbind(), strict=True)), device=self._device)

    def _whole_keys(self, keys: Tensor) -> Tensor:
        """Return the keys with indices in the whole tensor."""
        first = torch.tensor(list(self._first.values()), device=keys.device)
        return keys + first[keys >> INDEX_BITS]


def ordered_bits(scores: Tensor) -> Tensor:
    """Map float64 scores to int64 that, read as unsigned, have the same order; equal for equal scores."""
    bits = (scores + 0.0).view(torch.int64)  # -0.0 becomes 0.0
    return torch.where(bits < 0, ~bits, bits ^ SIGN_BIT)


def ordered_by_key(keys: Tensor) -> Tensor:
    """Map smaller keys to larger numbers."""
    return LARGEST - keys


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    whole = {key: torch.cat([part[key].view(-1) for part in parts]) for key in parts[0]}
    by_index = whole["indices"].argsort()
    order = by_index[whole["joined_at"][by_index].argsort(stable=True)]
    num_updates = whole.pop("num_updates").max()
    return {**{key: value[order] for key, value in whole.items()}, "num_updates": num_updates}
