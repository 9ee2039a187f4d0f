"""A few training steps of a model of three layers, with checks of what they promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradselect import ID3, AdaGradSelect, BlockOptimizer, Offload, SparseOptimizer, partition

from .findings import Status

NUM_STEPS = 6
WIDTH = 32


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3))
        self.head = nn.Linear(WIDTH, 16, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (8, 4) -> (8, 4, 16)
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A dtype of the weights, and the optimizer that trains them."""

    dtype: torch.dtype
    make: Callable[[nn.Module], BlockOptimizer | SparseOptimizer]


def _blocks(model: nn.Module) -> BlockOptimizer:
    return BlockOptimizer(model, AdaGradSelect(count=2, explore_steps=2), lr=1e-2)


def _offloaded(model: nn.Module) -> BlockOptimizer:
    policy = AdaGradSelect(count=2, explore_steps=2)
    return BlockOptimizer(model, policy, lr=1e-2, residency=Offload(), master_dtype=torch.float32)


def _entries(model: nn.Module) -> SparseOptimizer:
    return SparseOptimizer(model, ID3(budget=400, steps=NUM_STEPS), lr=1e-2)


SETUPS = {
    "blocks": Setup(dtype=torch.float32, make=_blocks),
    "blocks, bfloat16, offload": Setup(dtype=torch.bfloat16, make=_offloaded),
    "entries": Setup(dtype=torch.float32, make=_entries),
}


def train_a_few_steps(device: torch.device, setup: Setup) -> tuple[Status, str]:
    """Train, and check that the loss falls and that weights which are not selected stay.

    Raises:
        RuntimeError: they do not, or a step fails.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Model()
    model.to(device, setup.dtype)
    tokens = torch.arange(32).reshape(8, 4).remainder(16).to(device)  # (8, 4)
    optimizer = setup.make(model)
    losses: list[float] = []
    for _ in range(NUM_STEPS):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        loss = nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(1, 1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        _check_unselected(optimizer, model, before)
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss does not fall: {losses[0]:.3f}, after {NUM_STEPS} steps {losses[-1]:.3f}")
    return Status.OK, f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {NUM_STEPS} steps"


def _check_unselected(optimizer: BlockOptimizer | SparseOptimizer, model: nn.Module, before: dict[str, Tensor]) -> None:
    moved = {name: int((weight != before[name]).sum()) for name, weight in model.named_parameters()}
    if isinstance(optimizer, SparseOptimizer):
        num_selected = sum(map(len, optimizer.entries.values()))
        if not 0 < sum(moved.values()) <= num_selected:
            raise RuntimeError(f"{sum(moved.values())} entries have changed, and {num_selected} are selected")
        return
    assert optimizer.last_record is not None
    selected = optimizer.last_record.selected
    for block in partition(model):
        has_moved = any(moved[name] for name in block.parameter_names)
        if has_moved != (block.name in selected):
            raise RuntimeError(f"{block.name} {'changed' if has_moved else 'stayed'}, and {selected} are selected")
