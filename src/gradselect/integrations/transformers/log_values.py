"""Numbers for the Trainer's logs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from gradselect import MaskRecord, StepRecord


def summarise(records: Sequence[StepRecord] | Sequence[MaskRecord]) -> dict[str, float]:
    """Summarise one or more steps as the numbers that `SelectionCallback` logs.

    Example:
        >>> record = MaskRecord(step=0, num_entries={"w": 4}, num_new=4, overlap=1.0, grad_norm=2.0, state_bytes=64)
        >>> summarise([record])["selection/entries"]
        4.0
    """
    of_blocks = [record for record in records if isinstance(record, StepRecord)]
    of_masks = [record for record in records if isinstance(record, MaskRecord)]
    return _summarise_masks(of_masks) if of_masks else _summarise_blocks(of_blocks)


def _summarise_blocks(records: Sequence[StepRecord]) -> dict[str, float]:
    return {
        "selection/blocks": fmean(len(record.selected) for record in records),
        "selection/explored": fmean(record.explored for record in records),
        "selection/entropy": records[-1].selection_entropy,
        "selection/state_bytes": max(record.state_bytes for record in records),
        "selection/moved_bytes": fmean(record.moved_bytes for record in records),
    }


def _summarise_masks(records: Sequence[MaskRecord]) -> dict[str, float]:
    return {
        "selection/entries": fmean(sum(record.num_entries.values()) for record in records),
        "selection/new": fmean(record.num_new for record in records),
        "selection/overlap": min(record.overlap for record in records),
        "selection/state_bytes": max(record.state_bytes for record in records),
        "grad_norm": records[-1].grad_norm,
    }
