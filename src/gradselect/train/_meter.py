"""What a run used: seconds and bytes."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .. import BlockOptimizer, SparseOptimizer


class Meter(TrainerCallback):
    """Measures every step of this session; a resumed run starts anew.

    Attributes:
        step_seconds: of each step from its first forward pass to the end of its update, by the kind of step: "explore"
            and "exploit" where blocks are selected, else "step".
        held_bytes: what was held at the moment before the last update, by category.
        peak_bytes: the most that was held at the moment before an update, by category and "together".
    """

    def __init__(self) -> None:
        self.step_seconds: dict[str, list[float]] = defaultdict(list)
        self.held_bytes: dict[str, int] = {}
        self.peak_bytes: dict[str, int] = {}
        self._began = 0.0

    @property
    def total_seconds(self) -> float:
        """All steps together, without evaluation, checkpoints and logs."""
        return sum(map(sum, self.step_seconds.values()))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.held_bytes = training_bytes(parts["model"], parts["optimizer"].optimizer)
        counted = {**self.held_bytes, "together": sum(self.held_bytes.values())}
        self.peak_bytes = {name: max(count, self.peak_bytes.get(name, 0)) for name, count in counted.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        optimizer = parts["optimizer"].optimizer
        kind = "step"
        if isinstance(optimizer, BlockOptimizer) and optimizer.last_record is not None:
            kind = "explore" if optimizer.last_record.explored else "exploit"
        self.step_seconds[kind].append(time.perf_counter() - self._began)

    def describe(self) -> dict[str, Any]:
        """What `run.json` keeps."""
        return {
            "steps_by_kind": {kind: len(seconds) for kind, seconds in self.step_seconds.items()},
            "median_step_seconds": {kind: statistics.median(seconds) for kind, seconds in self.step_seconds.items()},
            "training_seconds": self.total_seconds,
            "peak_bytes": {
                "together": 0,
                **self.peak_bytes,
                "process": _peak_process_bytes(),
                "device": _peak_device_bytes(),
            },
        }


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes held now, in the categories of `BlockOptimizer.memory`, for any optimizer."""
    if isinstance(optimizer, BlockOptimizer | SparseOptimizer):
        held = optimizer.memory()
        return {
            "weights": held["weights"],
            "gradients": held["gradients"],
            "masters": held["masters"],
            "state_on_device": held["state_on_device"],
            "state_on_host": held["state_on_host"],
        }
    parameters = list(model.parameters())
    state = [value for entries in optimizer.state.values() for value in entries.values() if torch.is_tensor(value)]
    return {
        "weights": sum(map(_num_bytes, parameters)),
        "gradients": sum(_num_bytes(parameter.grad) for parameter in parameters if parameter.grad is not None),
        "masters": 0,
        # As there, step counters of a few bytes are not counted.
        "state_on_device": sum(_num_bytes(value) for value in state if value.ndim > 0),
        "state_on_host": 0,
    }


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _peak_process_bytes() -> int:
    """The most main memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_device_bytes() -> int:
    """The most memory that torch has allocated on the GPU; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
