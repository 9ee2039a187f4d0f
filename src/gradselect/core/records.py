"""Records of steps, and their JSONL writer."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from gradselect.files import write_atomically
from gradselect.usage import UsageError, check_file_name

from .gradients import Measure

logger = logging.getLogger(__name__)


OF_BORDERS = ("coasted", "rates")
"""Fields that a line of a records file holds only where they are not empty."""


class MemoryBytes(TypedDict):
    """Bytes held now, by category; their sum is the training state without activations.

    Step counters, four bytes for each parameter tensor, are not counted.
    """

    weights: int
    gradients: int
    masters: int
    state_on_device: int
    state_on_host: int


MEMORY_CATEGORIES = tuple(MemoryBytes.__annotations__)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Record of one step of a `BlockOptimizer`.

    Args:
        step: number of the step, from 0.
        selected: names of the updated blocks, in model order, `always` blocks included.
        explored: True if the policy selected from gradient norms, after a full backward pass.
        state_bytes: bytes of optimizer state and masters on the model's device during the update.
        moved_bytes: bytes of state and masters that moved between device and host for this step, both directions.
        selection_entropy: evenness of the updates so far over the policy's candidates, in [0, 1].
        norms: norm of the gradient of each observed block, by block; empty if none was observed.
        measure: kind of these norms: "l2", or the policy's own, "l1" (sum |g|) or "taylor" (sum |w g|). A file of
            records names it only if it is not "l2".
        refreshed: blocks whose master weights were set to weights that something else had changed before this step.
        coasted: blocks that moved by their momentum alone, in model order; see `Borders`.
        rates: factor of the learning rate of each selected block, where it was not 1; see `Borders`.

    Example:
        >>> import torch
        >>> import gradselect as gs
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> optimizer = gs.BlockOptimizer(model, gs.Fixed(("layer.1",)), lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.last_record.selected
        ('layer.1',)
    """

    step: int
    selected: tuple[str, ...]
    explored: bool
    state_bytes: int
    moved_bytes: int
    selection_entropy: float
    norms: Mapping[str, float] = field(default_factory=dict)
    measure: Measure = "l2"
    refreshed: tuple[str, ...] = ()
    coasted: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MaskRecord:
    """Record of one step of a `SparseOptimizer`.

    Args:
        step: number of the step, from 0.
        num_entries: number of entries of each tensor in the set, by tensor name; tensors without any are left out.
            Counts are over all ranks.
        num_new: number of entries that were not in the set of the last step.
        overlap: share of the last step's set that is still in the set; 1.0 at the first step.
        grad_norm: L2 norm of the applied gradients before clipping, over all ranks.
        state_bytes: bytes of indices, moments and masters on the model's device during the update, of this rank.
        refreshed: tensors whose master weights were set to weights that something else had changed before this step.

    Example:
        >>> import torch
        >>> import gradselect as gs
        >>> model = torch.nn.Linear(4, 4, bias=False)
        >>> optimizer = gs.SparseOptimizer(model, gs.TopGradient(density=0.25), lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.last_record.num_entries
        {'weight': 4}
    """

    step: int
    num_entries: Mapping[str, int]
    num_new: int
    overlap: float
    grad_norm: float
    state_bytes: int
    refreshed: tuple[str, ...] = ()


def selection_entropy(counts: Mapping[str, int]) -> float:
    """Normalised Shannon entropy of update counts: -sum(q ln q) / ln(n), q = counts / sum(counts).

    1.0 if all blocks were updated equally often, or there is only one. 0.0 if always the same one was, or none yet.
    """
    total = sum(counts.values())
    if len(counts) <= 1:
        return 1.0
    shares = [count / total for count in counts.values() if count]
    return -sum(share * math.log(share) for share in shares) / math.log(len(counts)) + 0.0


class JsonlWriter:
    """Record hook that appends one JSON object per line to a file.

    It continues an existing file. After a resume from an earlier checkpoint it first removes the lines of steps that
    run again, so every step is in the file once. A run that begins at step 0 replaces them all, and logs that.

    Args:
        path: the file; its folder must exist.

    Raises:
        UsageError: at the first record, if the file holds something else than records, or its folder does not exist.

    Example:
        >>> writer = JsonlWriter("records.jsonl")
        >>> writer(StepRecord(step=0, selected=(), explored=True, state_bytes=0, moved_bytes=0, selection_entropy=0.0))
        >>> writer.path.read_text()
        '{"step": 0, "selected": [], "explored": true, ...}\\n'
    """

    def __init__(self, path: str | Path) -> None:
        check_file_name("path", path, example="selection.jsonl")
        self.path = Path(path)
        self._last_step = math.inf

    def __call__(self, record: StepRecord | MaskRecord) -> None:
        if record.step <= self._last_step:  # the first record, or an earlier state was loaded
            self._check_place()
            self._forget_from(record.step)
        self._last_step = record.step
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_as_json(record), allow_nan=False) + "\n")

    def _check_place(self) -> None:
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise UsageError(
                f"records cannot be written to {self.path}: it is a folder, or its own folder does not exist; write "
                "e.g. selection.jsonl, or make the folder first"
            )

    def _forget_from(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A killed writer can leave an incomplete last line; its step runs again.
        whole = [line for line in lines if line.endswith("\n") or line[:9] != '{"step": '[: len(line)]]
        kept = [line for line in whole if self._step_of(line) < step]
        if lines and step == 0 and self._last_step == math.inf:
            logger.warning(
                "%s holds %d records of another run, which this one replaces: it begins at step 0; write each run to "
                "a file of its own to keep both",
                *(self.path, len(lines)),
            )
        write_atomically(self.path, "".join(kept))

    def _step_of(self, line: str) -> int:
        try:
            return int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f"{self.path} holds something else than records ({line.strip()[:60]!r}), and stays as it is; write "
                "records to another file, e.g. selection.jsonl"
            ) from None


def _as_json(record: StepRecord | MaskRecord) -> dict[str, Any]:
    """Return the record as plain values; NaN and infinity, which JSON lacks, become None."""
    values = {key: _finite(value) for key, value in asdict(record).items()}
    if values.get("measure") == "l2":
        del values["measure"]  # of most policies: their files stay as they were
    return {key: value for key, value in values.items() if value or key not in OF_BORDERS}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
