"""A tiny model with parts that the loss may not reach, and a loop."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import PlainLayer, seeded
from torch import Tensor, nn

import gradselect as gs

HIDDEN = 16


class Parts(nn.Module):
    """Embedding, layers, a norm and a head; beside them an unused pooler, a tower for pictures, experts by number.

    Attributes:
        skipped: numbers of layers that the forward pass leaves out.
    """

    def __init__(
        self, *, layers: int = 5, skipped: tuple[int, ...] = (), beside: bool = True, head: bool = True
    ) -> None:
        super().__init__()
        self.skipped = skipped
        self.tokens = nn.Embedding(11, HIDDEN)
        self.layers = nn.ModuleList(PlainLayer() for _ in range(layers))
        self.norm = nn.LayerNorm(HIDDEN)
        if beside:
            self.pooler = nn.Linear(HIDDEN, HIDDEN)
            self.tower = nn.Linear(HIDDEN, HIDDEN)
            self.expert_0 = nn.Linear(HIDDEN, HIDDEN)
            self.expert_1 = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, 3) if head else nn.Identity()

    def forward(self, tokens: Tensor, *, pictures: bool = False, expert: int | None = None) -> Tensor:
        """A loss."""
        hidden = self.tokens(tokens)
        for number, layer in enumerate(self.layers):
            hidden = hidden if number in self.skipped else layer(hidden)
        if pictures:
            hidden = hidden + self.tower(torch.ones(HIDDEN))
        if expert is not None:
            hidden = hidden + getattr(self, f"expert_{expert}")(hidden)
        hidden = self.norm(hidden)
        if hasattr(self, "pooler"):
            self.pooler(hidden)
        return self.head(hidden).square().mean()


def parts(**settings: Any) -> Parts:
    return seeded(lambda: Parts(**settings))


def tokens(number: int) -> Tensor:
    return torch.randint(11, (2, 4), generator=torch.Generator().manual_seed(number))


def steps(
    model: nn.Module, optimizer: gs.BlockOptimizer, numbers: range, *, passes: int = 1, **batch: Any
) -> list[tuple[str, ...]]:
    """Take a step for each number; return the selections of those that counted."""
    selections: list[tuple[str, ...]] = []
    handle = optimizer.add_record_hook(lambda record: selections.append(record.selected))
    for number in numbers:
        for part in range(passes):
            model(tokens(passes * number + part), **batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    return selections
