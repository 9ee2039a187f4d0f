"""Records of a whole run, collected in memory or read from their file."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any

from gradselect.usage import UsageError

from .records import MaskRecord, StepRecord


@dataclass(kw_only=True)
class BlockHistory:
    """Blocks that each step of a run updated. It is a record hook: `optimizer.add_record_hook(history)`.

    Args:
        names: names of all blocks, in model order. Blocks that turn up in a record only are put among them.

    Attributes:
        steps: numbers of the steps, from 0, ascending.
        selected: names of the updated blocks, by step.
        explored: True if the step read all gradients, by step.
        state_bytes: bytes of state and masters on the device during the update, by step.
        moved_bytes: bytes that moved between device and host for the step, by step.

    Example:
        >>> history = BlockHistory(names=("layer.0", "layer.1"))
        >>> history({"step": 0, "selected": ["layer.1"], "explored": True, "state_bytes": 64, "moved_bytes": 0})
        >>> history.updates
        {'layer.0': 0, 'layer.1': 1}
    """

    names: Sequence[str] = ()
    steps: list[int] = field(default_factory=list)
    selected: list[tuple[str, ...]] = field(default_factory=list)
    explored: list[bool] = field(default_factory=list)
    state_bytes: list[int] = field(default_factory=list)
    moved_bytes: list[int] = field(default_factory=list)
    _pairs: dict[tuple[str, ...], None] = field(default_factory=dict, repr=False)
    """Neighbours in the records, and single names: they tell the order of the blocks."""
    _merged: tuple[int, tuple[str, ...]] = field(default=(-1, ()), repr=False)
    """Number of pairs that the order was made from, and the order."""

    def __call__(self, record: StepRecord | Mapping[str, Any]) -> None:
        """Add the record of the next step; after a resume it replaces that step and all behind it."""
        values: Mapping[str, Any] = vars(record) if isinstance(record, StepRecord) else record
        _forget_from(values["step"], self.steps, self.selected, self.explored, self.state_bytes, self.moved_bytes)
        self.steps.append(values["step"])
        self.selected.append(tuple(values["selected"]))
        self.explored.append(bool(values["explored"]))
        self.state_bytes.append(values.get("state_bytes", 0))
        self.moved_bytes.append(values.get("moved_bytes", 0))
        for order in (self.selected[-1], tuple(values.get("norms", ()))):
            self._pairs.update(dict.fromkeys(pairwise(order)) if len(order) > 1 else {order: None})

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of all blocks, in model order as far as it is known."""
        if self._merged[0] != len(self._pairs):
            self._merged = len(self._pairs), merge_orders([self.names, *self._pairs])
        return self._merged[1]

    @property
    def updates(self) -> dict[str, int]:
        """Number of updates of each block."""
        counts = Counter(name for selected in self.selected for name in selected)
        return {name: counts[name] for name in self.blocks}


@dataclass(kw_only=True)
class EntryHistory:
    """Entries that each step of a run updated. It is a record hook.

    Attributes:
        steps: numbers of the steps, from 0, ascending.
        entries: number of entries in the set, by step.
        new: number of entries that the last step's set did not hold, by step.
        overlap: share of the last step's set that is still in the set, by step.
        state_bytes: bytes of indices, moments and masters on the device during the update, by step.
        by_tensor: number of entries of each tensor at the last step.

    Example:
        >>> history = EntryHistory()
        >>> history({"step": 0, "num_entries": {"w": 4, "v": 1}, "num_new": 5, "overlap": 1.0, "state_bytes": 64})
        >>> history.entries
        [5]
    """

    steps: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)
    state_bytes: list[int] = field(default_factory=list)
    by_tensor: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, record: MaskRecord | Mapping[str, Any]) -> None:
        """Add the record of the next step; after a resume it replaces that step and all behind it."""
        values: Mapping[str, Any] = vars(record) if isinstance(record, MaskRecord) else record
        _forget_from(values["step"], self.steps, self.entries, self.new, self.overlap, self.state_bytes)
        self.steps.append(values["step"])
        self.by_tensor = dict(values["num_entries"])
        self.entries.append(sum(self.by_tensor.values()))
        self.new.append(values["num_new"])
        self.overlap.append(values["overlap"])
        self.state_bytes.append(values.get("state_bytes", 0))


def read_history(path: str | Path, *, names: Sequence[str] = ()) -> BlockHistory | EntryHistory | None:
    """Read the file of a `JsonlWriter`; None if it holds no record.

    An incomplete last line, which a killed writer leaves, is not read.

    Args:
        path: of the file.
        names: names of all blocks, in model order, if they are known.

    Raises:
        UsageError: a line is no record; names file and line.

    Example:
        >>> _ = Path("records.jsonl").write_text('{"step": 0, "selected": ["head"], "explored": false}\\n')
        >>> read_history("records.jsonl").selected
        [('head',)]
    """
    history: BlockHistory | EntryHistory | None = None
    for number, line in enumerate(_whole_lines(Path(path)), 1):
        try:
            record = json.loads(line)
            if history is None:
                history = EntryHistory() if "num_entries" in record else BlockHistory(names=names)
            history(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path}, line {number}: no selection record ({type(error).__name__}: {error}); give the file that "
                "JsonlWriter or SelectionCallback(jsonl=...) wrote"
            ) from None
    return history


def merge_orders(orders: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Merge ordered lists of names into one; names that no list orders are sorted, numbers by their value.

    Example:
        >>> merge_orders([("layer.10", "head"), ("embedding", "layer.9"), ("layer.9",)])
        ('embedding', 'layer.9', 'layer.10', 'head')
    """
    sorter: TopologicalSorter[str] = TopologicalSorter()
    listed = [tuple(order) for order in orders]
    for order in listed:
        for name in order:
            sorter.add(name)
        for before, after in pairwise(order):
            sorter.add(after, before)
    try:
        sorter.prepare()
    except CycleError:  # records of different models
        return tuple(sorted({name for order in listed for name in order}, key=_place))
    ready: list[tuple[Any, str]] = []
    merged: list[str] = []
    while sorter.is_active():
        for name in sorter.get_ready():
            heappush(ready, (_place(name), name))
        merged.append(heappop(ready)[1])
        sorter.done(merged[-1])
    return tuple(merged)


def _place(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts blocks as models usually have them, and numbers by their value."""
    numbers = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
    return [({"embedding": 0, "norm": 2, "head": 3}.get(name, 1), 0, ""), *numbers]


def _whole_lines(path: Path) -> Iterator[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text ({error})") from None
    yield from (line for line in lines if line.endswith("\n"))


def _forget_from(step: int, steps: list[int], *others: list[Any]) -> None:
    """Delete what is known of this step and of later ones."""
    kept = bisect_left(steps, step)
    for values in (steps, *others):
        del values[kept:]
