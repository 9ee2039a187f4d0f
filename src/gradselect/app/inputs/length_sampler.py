"""Order of the rows in which those of a batch have about the same length."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

POOL = 50
"""Most batches in a pool, within which rows are sorted. More pad less, and leave less to chance."""
LEAST_POOLS = 4
"""Pools of few rows, so that other rows meet in each epoch."""


class LengthSampler(Sampler[int]):
    """Rows of about the same length in each batch, drawn anew in each epoch.

    The rows are shuffled and cut into pools of 50 batches, or into four pools if there are fewer rows. Within a pool
    they are sorted by length and cut into batches, and the batches of all pools are shuffled, so that the lengths of
    one step say nothing about those of the next. The longest row comes with the first batch: if the memory is too small
    for it, the first step tells.

    The order is a function of the seed and the epoch alone. (That of transformers goes on with one generator from epoch
    to epoch, so a resumed run would see other batches.)

    Args:
        lengths: tokens of each row.
        batch_size: rows that pass through the model at the same time, on all devices together.
        seed: seed of the order.

    Example:
        >>> sampler = LengthSampler([3, 9, 4, 8, 3, 9], batch_size=2, seed=0)
        >>> sorted(sampler), len(sampler)
        ([0, 1, 2, 3, 4, 5], 6)
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"lengths/{self._seed}/{self._epoch}")
        order = chance.sample(range(len(self)), len(self))
        in_pool = max(1, min(POOL, len(self) // (LEAST_POOLS * self._batch_size)))
        batches, rest = [], []
        for pool in _cut(order, in_pool * self._batch_size):
            pool.sort(key=lambda row: self._lengths[row], reverse=True)
            batches += _cut(pool, self._batch_size)
        if batches and len(batches[-1]) < self._batch_size:
            rest = batches.pop()  # a batch that is not full has to be the last one
        chance.shuffle(batches)
        if batches:
            first = max(range(len(batches)), key=lambda place: self._lengths[batches[place][0]])
            batches[0], batches[first] = batches[first], batches[0]
            if rest and self._lengths[rest[0]] > self._lengths[batches[0][0]]:
                rest[0], batches[0][-1] = batches[0][-1], rest[0]
        for batch in (*batches, rest):
            yield from batch


def padding_share(lengths: Sequence[int], *, batch_size: int) -> float:
    """Return the share of padding in the tokens of all batches, each as long as its longest row.

    Args:
        lengths: tokens of the rows, in their order.
        batch_size: rows of a batch.

    Example:
        >>> padding_share([2, 4, 4, 4], batch_size=2)
        0.125
    """
    batches = _cut(lengths, batch_size)
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def _cut(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
