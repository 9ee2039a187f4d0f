"""Masks that estimate from batches: every process sees all of them."""

from __future__ import annotations

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from gradselect.app.train.setup import for_every_process


@pytest.mark.parametrize("processes", [2, 3])
def test_every_process_estimates_from_all_batches(processes: int) -> None:
    """As Accelerate deals batches out to processes; the remaining rows are not a whole batch."""
    rows = [9, 3, 7, 1, 8, 2, 6]
    dealt = for_every_process(rows, batch_size=2, processes=processes)
    sampler = BatchSampler(SequentialSampler(range(len(dealt))), batch_size=2, drop_last=False)
    for process in range(processes):
        batches = BatchSamplerShard(sampler, num_processes=processes, process_index=process)
        assert [[dealt[index] for index in batch] for batch in batches] == [[9, 3], [7, 1], [8, 2]]
