"""Entries of tensors that several processes hold in parts: where they lie, and how the best of all are agreed on."""

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

from .top_k import INDEX_BITS, Best

DIGIT_BITS = 8
NUM_DIGITS = 1 << DIGIT_BITS
SIGN_BIT = torch.iinfo(torch.int64).min
LARGEST = torch.iinfo(torch.int64).max


class Shards:
    """Which entries of named tensors this process holds, and what must be added up over the others.

    A tensor that is held whole, by one process alone or as a replica, costs nothing: every process finds the same.

    Args:
        tensors: by name, in model order; a tensor's position is its rank.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._groups = {name: shard_groups(tensor) for name, tensor in tensors.items()}
        self._first = {name: local_start(tensor, name=name) for name, tensor in tensors.items()}
        self._sizes = {name: local_part(tensor).numel() for name, tensor in tensors.items()}
        self._kinds = tuple(dict.fromkeys(self._groups.values()))
        self._device = next((collective_device(t) for t in tensors.values() if shard_groups(t)), torch.device("cpu"))
        self.is_split = any(self._groups.values())

    # Numbers ------------------------------------------------------------------------------------------------------

    def total(self, numbers: Mapping[str, int]) -> dict[str, int]:
        """By tensor the sum of the numbers of all who hold a part of it; tensors left out have none."""
        if not self.is_split:
            return dict(numbers)
        of_kinds = {
            groups: torch.tensor([numbers.get(name, 0) * (ours == groups) for name, ours in self._groups.items()])
            for groups in self._kinds
        }
        totals = sum_over_ranks(of_kinds, device=self._device)
        return {name: total for name, total in zip(self._groups, totals.tolist(), strict=True) if name in numbers}

    # Places -------------------------------------------------------------------------------------------------------

    def inside(self, name: str, indices: Tensor) -> Tensor:
        """Of indices in the whole tensor those in this process' part, counted from its beginning."""
        if not self._groups[name]:
            return indices
        places = indices - self._first[name]
        return places[(places >= 0) & (places < self._sizes[name])]

    def in_whole(self, name: str, places: Tensor) -> Tensor:
        """The opposite: indices in the whole tensor (int64) of places in this process' part."""
        return places.long() + self._first[name]

    # Checkpoints --------------------------------------------------------------------------------------------------

    def gather(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of a tensor's entries (as of `EntryStore.state`) of all processes, by indices in the whole tensor.

        In the order of joining, entries of a cohort by index. On the CPU where it was gathered.
        """
        parts = [{key: value.cpu() for key, value in state.items()}] if self._groups[name] else []
        for part in parts:
            part["indices"] = self.in_whole(name, part["indices"])
        for group in self._groups[name]:
            everyone: list[list[dict[str, Tensor]]] = [[] for _ in range(group.size())]
            with naming_the_collective(f"gathering the state of {name}"):
                dist.all_gather_object(everyone, parts, group=group)
            parts = [part for several in everyone for part in several]
        return _joined(parts) if parts else state

    def own(self, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this process holds of the gathered state."""
        if not self._groups[name]:
            return dict(state)
        places = state["indices"].long() - self._first[name]
        mine = (places >= 0) & (places < self._sizes[name])
        parts = {**state, "indices": places}
        return {key: value[mine] if value.ndim else value for key, value in parts.items()}

    # Contests -----------------------------------------------------------------------------------------------------

    def best_of_all(self, offers: Sequence[Best], counts: Sequence[int]) -> list[Best]:
        """Of each contest the `count` best among the offers of all processes, as far as they are this one's.

        Nobody sees the others' scores: each process counts how many of its own have each value of a digit, eight
        bits at a time, and the counts are added up. Ties go to the lower rank, then to the lower index in the whole
        tensor, as in one process.

        Args:
            offers: of every contest this process' own best, `count` at most.
            counts: how many may win each contest.
        """
        device = next((keys.device for _, keys, _ in offers if keys.numel()), torch.device("cpu"))
        scores = torch.cat([scores.to(device, torch.float64) for scores, _, _ in offers])
        keys = torch.cat([keys.to(device) for _, keys, _ in offers])
        contests = torch.cat([torch.full((len(keys),), n, device=device) for n, (_, keys, _) in enumerate(offers)])
        wins, ties, wanted, num_ties = self._largest(ordered_bits(scores), keys, contests, torch.tensor(counts))
        if bool((num_ties > wanted).any()):
            tied = ties.nonzero().view(-1)
            codes = ordered_by_key(self._whole_keys(keys[tied]))
            first, last, _, _ = self._largest(codes, keys[tied], contests[tied], wanted)
            ties = torch.zeros_like(ties).index_put_((tied,), first | last)
        winners = (wins | ties).split([len(keys) for _, keys, _ in offers])
        return [
            (scores[won.to(scores.device)], keys[won.to(keys.device)], values[won.to(values.device)])
            for won, (scores, keys, values) in zip(winners, offers, strict=True)
        ]

    def _largest(
        self, codes: Tensor, keys: Tensor, contests: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The `wanted` largest codes of each contest over all processes, codes read as unsigned numbers.

        Returns:
            Which codes of this process are larger than the last that is wanted; which equal it; how many of the equal
            ones are wanted, of all processes together; and how many there are. The last two by contest.
        """
        kinds = torch.tensor([self._kinds.index(groups) for groups in self._groups.values()], device=keys.device)
        cells = kinds[keys >> INDEX_BITS] * len(wanted) + contests
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
            limits = last.view(-1).to(codes.device)[contests]
            wins |= ties & (digits > limits)
            ties &= digits == limits
        return wins, ties, wanted, num_ties

    def _counts(self, bins: Tensor, num_contests: int) -> Tensor:
        """How often each digit occurs, of all processes. Shape (num_contests, NUM_DIGITS), on the CPU."""
        shape = (len(self._kinds), num_contests, NUM_DIGITS)
        of_kinds = torch.bincount(bins, minlength=shape[0] * shape[1] * shape[2]).view(shape)
        return sum_over_ranks(dict(zip(self._kinds, of_kinds.unbind(), strict=True)), device=self._device)

    def _whole_keys(self, keys: Tensor) -> Tensor:
        """Keys with the index in the whole tensor."""
        first = torch.tensor(list(self._first.values()), device=keys.device)
        return keys + first[keys >> INDEX_BITS]


def ordered_bits(scores: Tensor) -> Tensor:
    """For float64 scores whole numbers that, read as unsigned, are in the same order; equal for equal scores."""
    bits = (scores + 0.0).view(torch.int64)  # -0.0 becomes 0.0
    return torch.where(bits < 0, ~bits, bits ^ SIGN_BIT)


def ordered_by_key(keys: Tensor) -> Tensor:
    """A larger number for a smaller key."""
    return LARGEST - keys


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    whole = {key: torch.cat([part[key].view(-1) for part in parts]) for key in parts[0]}
    by_index = whole["indices"].argsort()
    order = by_index[whole["joined_at"][by_index].argsort(stable=True)]
    num_updates = whole.pop("num_updates").max()
    return {**{key: value[order] for key, value in whole.items()}, "num_updates": num_updates}
