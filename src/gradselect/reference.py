"""The slow, readable twin of every fast path. Nothing here is used in training; the tests compare against it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._blocks import Block
from ._policy import AbstractPolicy


def block_norms(blocks: Sequence[Block]) -> dict[str, float]:
    """||g_b||_2 of every block from gradients that are all there; twin of the norms taken in backward hooks."""
    norms = {}
    for block in blocks:
        squares = [p.grad.double().square().sum().item() for p in block.parameters if p.grad is not None]
        norms[block.name] = math.sqrt(sum(squares))
    return norms


def top_blocks(scores: Mapping[str, float], count: int) -> set[str]:
    """The `count` best blocks of a finished backward pass; twin of streaming top-k, which forgets on the way."""
    ranked = sorted(scores, key=lambda name: scores[name], reverse=True)
    return set(ranked[:count])


@dataclass
class Moments:
    """AdamW's state of one weight tensor."""

    mean: Tensor
    square: Tensor
    num_updates: int = 0


@dataclass
class SelectiveAdamW:
    """Twin of `BlockOptimizer` with `Keep()` in fp32: all gradients are there, the formula is written out.

    Args:
        blocks: every block of the model, each parameter trainable at all times.
        policy: bound to these blocks.
        lr, beta1, beta2, eps, weight_decay: of AdamW; tensors of fewer than two dimensions are not decayed.

    Reference: Loshchilov, Hutter, arXiv 1711.05101, algorithm 2.
    """

    blocks: Sequence[Block]
    policy: AbstractPolicy
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    moments: dict[str, Moments] = field(default_factory=dict)
    num_steps: int = 0

    @torch.no_grad()
    def step(self) -> tuple[str, ...]:
        """One step from the gradients of all blocks; returns the selection."""
        selected = self.policy.propose(self.num_steps)
        norms = {}
        if selected is None:
            norms = block_norms(self.blocks)
            selected = self.policy.decide(self.num_steps, norms)
        for block in self.blocks:
            if block.name in selected:
                for name, weight in zip(block.parameter_names, block.parameters, strict=True):
                    if weight.grad is not None:
                        self._move(name, weight, weight.grad)
        self.policy.commit(self.num_steps, selected, norms)
        self.num_steps += 1
        return selected

    def _move(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        if name not in self.moments:
            self.moments[name] = Moments(torch.zeros_like(weight), torch.zeros_like(weight))
        moments = self.moments[name]
        moments.num_updates += 1
        moments.mean = self.beta1 * moments.mean + (1 - self.beta1) * gradient
        moments.square = self.beta2 * moments.square + (1 - self.beta2) * gradient**2
        mean = moments.mean / (1 - self.beta1**moments.num_updates)
        square = moments.square / (1 - self.beta2**moments.num_updates)
        if weight.ndim >= 2:
            weight -= self.lr * self.weight_decay * weight
        weight -= self.lr * mean / (square.sqrt() + self.eps)
