"""What a run selected, step by step, from the records it wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import BlockOptimizer, SparseOptimizer


def describe_selection(optimizer: torch.optim.Optimizer, records_file: Path) -> dict[str, Any] | None:
    """Which blocks were updated when, or which mask chose how much; None where nothing is selected.

    Of blocks: their names; `updates` by block; and by step, of the whole run, the indices of the blocks `selected`,
    whether all gradients were looked at (`explored`), and the `entropy` of all updates so far.
    """
    if isinstance(optimizer, SparseOptimizer):
        return _describe_mask(optimizer)
    if not isinstance(optimizer, BlockOptimizer) or not records_file.exists():
        return None
    records = read_records(records_file)
    places = {name: place for place, name in enumerate(optimizer.blocks)}
    return {
        "blocks": list(optimizer.blocks),
        "updates": list(optimizer.update_counts.values()),
        "entropy": [record["selection_entropy"] for record in records],
        "selected": [[places[name] for name in record["selected"]] for record in records],
        "explored": [int(record["explored"]) for record in records],
    }


def describe_flop(optimizer: torch.optim.Optimizer, records_file: Path) -> dict[str, Any]:
    """The limit of the speed-up over full fine-tuning; None where no blocks are selected."""
    # Here rather than above: the comparison imports the training that it compares.
    from ..compare._flop import speed_up_limit

    if not isinstance(optimizer, BlockOptimizer) or not records_file.exists():
        return {"limit": None, "speed_up": None}
    # Where all were looked at, all have a norm.
    steps = [{*record["selected"], *record["norms"]} for record in read_records(records_file)]
    sizes = {name: sum(map(torch.Tensor.numel, optimizer._table.of(name))) for name in optimizer.blocks}
    return {"limit": speed_up_limit(steps, sizes), "speed_up": None}


def read_records(path: Path) -> Sequence[Mapping[str, Any]]:
    """The records of all steps, in order."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _describe_mask(optimizer: SparseOptimizer) -> dict[str, Any]:
    record = optimizer.last_record
    by_tensor = {} if record is None else dict(record.num_entries)
    return {
        "mask": type(optimizer.mask).__name__,
        "settings": optimizer.mask.settings(),
        "entries": sum(by_tensor.values()),
        "entries_to_choose_from": sum(tensor.numel for tensor in optimizer.mask.tensors),
        "entries_by_tensor": by_tensor,
        "overlap": None if record is None else record.overlap,
    }
