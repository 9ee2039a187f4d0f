"""Parts of the two pretrainings, lab_base.py and pretrain_encoder.py: a training that resumes, and text files."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradselect.files import writing_aside


@dataclass
class Training:
    """Model, optimizers and progress of a pretraining.

    Args:
        seconds: seconds in steps, of all calls together.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    step: int = 0
    seconds: float = 0.0
    rates: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def update(self, loss: Tensor, *, share: float, clip: float) -> None:
        """Take a step at `share` of the full learning rates, with gradients clipped to the norm `clip`."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
        self.model.zero_grad()
        self.step += 1

    def save(self, file: Path, **others: Any) -> None:
        """Write all that a call needs to resume, `others` included."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            **others,
        }
        with writing_aside(file) as aside:
            torch.save(state, aside)

    def load(self, file: Path, *, device: torch.device | None = None) -> dict[str, Any]:
        """Resume from the file. Returns its content, `others` included."""
        state = torch.load(file, weights_only=True, map_location=device)
        self.model.load_state_dict(state["model"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.step, self.seconds = state["step"], state["seconds"]
        return state


def open_text(path: Path) -> IO[bytes]:
    """Open a text file, plain or packed by xz."""
    return lzma.open(path) if path.suffix == ".xz" else path.open("rb")
