"""Seconds and bytes of a run."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from gradselect import BlockOptimizer, SparseOptimizer
from gradselect.app.recipe import peer_bytes
from gradselect.app.runtime import peak_process_bytes
from gradselect.core import num_bytes

from .stopwatch import DeviceClock, HostClock, Stopwatch
from .trainer import RunTrainer

PHASES = ("forward", "backward", "optimizer", "selection")
"""Parts of a step's time.

"selection" is decisions of a policy or mask, gradient norms (also those taken during the backward pass), freezing and
records. "optimizer" is everything else after the backward pass: clipping, update, moves of state, schedule.
"""

MEASURING = "measuring"
"""Time of the meter itself, which is not counted."""

PHASE_OF = {"selection": "selection", "state": "optimizer"}
"""Moves of state within a selection count as "optimizer"."""


class Meter(TrainerCallback):
    """Measures every step of this session. A resumed run starts from zero.

    On a GPU it reads the GPU's own clock, one step late, so training never waits for the meter.

    Args:
        trainer: trainer to measure.

    Attributes:
        step_seconds: seconds of each step, from its first forward pass to the end of its update, by kind of step:
            "explore" and "exploit" if blocks are selected, else "step".
        held_bytes: bytes held before the last update, by category.
        peak_bytes: peak bytes held before an update, by category and "together".
    """

    def __init__(self, trainer: RunTrainer) -> None:
        self.step_seconds: dict[str, list[float]] = defaultdict(list)
        self.held_bytes: dict[str, int] = {}
        self.peak_bytes: dict[str, int] = {}
        self._trainer = trainer
        self._phase_seconds: dict[str, list[dict[str, float]]] = defaultdict(list)
        self._sums: dict[str, int] = defaultdict(int)
        self._num_samples = 0
        self._gpu = _GpuMemory() if trainer.args.device.type == "cuda" else None
        self._watch = Stopwatch(HostClock() if self._gpu is None else DeviceClock())
        self._unread: tuple[str, Any] | None = None
        self._listening: RemovableHandle | None = None

    @property
    def total_seconds(self) -> float:
        """Seconds of all steps, without evaluation, checkpoints and logs."""
        self._read()
        return sum(map(sum, self.step_seconds.values()))

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self._watch.wrap(self._trainer, "training_step", phase="forward")
        self._watch.wrap(self._trainer.accelerator, "backward", phase="backward")
        optimizer = parts["optimizer"].optimizer
        if isinstance(optimizer, BlockOptimizer | SparseOptimizer):
            self._listening = optimizer.phases(lambda phase: self._watch.phase(PHASE_OF[phase]))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._watch.start("optimizer")
        if self._gpu is not None:
            self._gpu.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        with self._watch.phase(MEASURING):
            self._count_bytes(training_bytes(parts["model"], parts["optimizer"].optimizer))

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        marks = self._watch.stop()
        kind = kind_of_step(parts["optimizer"].optimizer)
        self._read()
        self._unread = kind, marks
        if self._gpu is not None:
            self._gpu.end_step(kind)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Remove the stopwatch, also after an error."""
        self._watch.unwrap()
        if self._listening is not None:
            self._listening.remove()

    def describe(self) -> dict[str, Any]:
        """Return the measurements that `run.json` keeps."""
        self._read()
        peak = {"together": 0, **self.peak_bytes}
        process = peak_process_bytes()
        return {
            "steps_by_kind": {kind: len(seconds) for kind, seconds in self.step_seconds.items()},
            "median_step_seconds": {kind: statistics.median(seconds) for kind, seconds in self.step_seconds.items()},
            "training_seconds": self.total_seconds,
            "peak_bytes": {**peak, "process": process, "device": 0 if self._gpu is None else self._gpu.peak_allocated},
            "seconds": {
                "training": self.total_seconds,
                "by_kind": {kind: medians(steps) for kind, steps in self._phase_seconds.items()},
            },
            "bytes": {
                "peak": peak,
                "average": {name: total / self._num_samples for name, total in self._sums.items()},
                "process": process,
                **({"allocated": None, "reserved": None} if self._gpu is None else self._gpu.describe()),
            },
        }

    def _count_bytes(self, held: dict[str, int]) -> None:
        self.held_bytes = held
        counted = {**held, "together": sum(held.values())}
        self.peak_bytes = {name: max(count, self.peak_bytes.get(name, 0)) for name, count in counted.items()}
        for name, count in counted.items():
            self._sums[name] += count
        self._num_samples += 1
        if self._gpu is not None:
            self._gpu.sample()

    def _read(self) -> None:
        """Read the marks that are still unread; a GPU has passed them by now."""
        if self._unread is not None:
            (kind, marks), self._unread = self._unread, None
            seconds = self._watch.read(marks)
            phases = {name: seconds.get(name, 0.0) for name in PHASES}
            self._phase_seconds[kind].append(phases)
            self.step_seconds[kind].append(sum(phases.values()))


class _GpuMemory:
    """Bytes that torch's allocator has given to tensors (allocated) and taken from the device (reserved).

    Peaks cover whole steps. Averages are over the moments before updates.
    """

    def __init__(self) -> None:
        self.peak_allocated = torch.accelerator.max_memory_allocated()
        self._peak_reserved = torch.accelerator.max_memory_reserved()
        self._peak_by_kind: dict[str, int] = {}
        self._allocated: list[int] = []
        self._reserved: list[int] = []

    def begin_step(self) -> None:
        torch.accelerator.reset_peak_memory_stats()

    def sample(self) -> None:
        self._allocated.append(torch.accelerator.memory_allocated())
        self._reserved.append(torch.accelerator.memory_reserved())

    def end_step(self, kind: str) -> None:
        peak = torch.accelerator.max_memory_allocated()
        self._peak_by_kind[kind] = max(peak, self._peak_by_kind.get(kind, 0))
        self.peak_allocated = max(peak, self.peak_allocated)
        self._peak_reserved = max(torch.accelerator.max_memory_reserved(), self._peak_reserved)

    def describe(self) -> dict[str, Any]:
        return {
            "allocated": {
                "peak": self.peak_allocated,
                "average": _mean(self._allocated),
                "peak_by_kind": self._peak_by_kind,
            },
            "reserved": {
                "peak": self._peak_reserved,
                "average": _mean(self._reserved),
                "99th": percentile(self._reserved, 99),
            },
        }


def kind_of_step(optimizer: torch.optim.Optimizer) -> str:
    """Return the kind of the last step: "explore" or "exploit" if blocks are selected, else "step"."""
    if isinstance(optimizer, BlockOptimizer) and optimizer.last_record is not None:
        return "explore" if optimizer.last_record.explored else "exploit"
    return "step"


def medians(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the number of steps and the medians of their time and of each phase. Medians need not add up."""
    whole = {"steps": len(steps), "median": statistics.median(sum(phases.values()) for phases in steps)}
    return whole | {name: statistics.median(phases[name] for phases in steps) for name in PHASES}


def percentile(values: Sequence[int], share: float) -> float | None:
    """Return the interpolated value that `share` percent of `values` do not exceed; None if there are none."""
    if not values:
        return None
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), share / 100))


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes held now, in the categories of `BlockOptimizer.memory`, for any optimizer."""
    if isinstance(optimizer, BlockOptimizer | SparseOptimizer):
        return cast(dict[str, int], optimizer.memory())
    parameters = list(model.parameters())
    masters, gradients, state = peer_bytes(optimizer)
    return {
        "weights": sum(map(num_bytes, parameters)),
        "gradients": gradients + sum(num_bytes(p.grad) for p in parameters if p.grad is not None),
        "masters": masters,
        "state_on_device": state,
        "state_on_host": 0,
    }


def _mean(values: Sequence[int]) -> float | None:
    return statistics.fmean(values) if values else None
