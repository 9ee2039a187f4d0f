"""Slow, readable twins of every fast path. Training uses none of them; tests compare against them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradselect.blocks import AbstractPolicy
from gradselect.core import Block, Measure


def block_norms(blocks: Sequence[Block], *, measure: Measure = "l2") -> dict[str, float]:
    """Return the norm of every block's gradient, from complete gradients; twin of those taken in backward hooks."""
    norms = {}
    for block in blocks:
        pairs = [(p.grad.double(), p.detach().double()) for p in block.parameters if p.grad is not None]
        if measure == "l2":
            norms[block.name] = math.sqrt(sum(gradient.square().sum().item() for gradient, _ in pairs))
        elif measure == "l1":
            norms[block.name] = sum(gradient.abs().sum().item() for gradient, _ in pairs)
        else:
            norms[block.name] = sum((weight * gradient).abs().sum().item() for gradient, weight in pairs)
    return norms


def top_blocks(scores: Mapping[str, float], count: int) -> set[str]:
    """Return the `count` blocks of largest score; twin of the streaming top-k, which drops gradients early."""
    ranked = sorted(scores, key=lambda name: scores[name], reverse=True)
    return set(ranked[:count])


@dataclass
class Moments:
    """AdamW state of one weight tensor."""

    mean: Tensor
    square: Tensor
    num_updates: int = 0


@dataclass
class SelectiveAdamW:
    """Twin of `BlockOptimizer` with `Keep()` in fp32: complete gradients, and the formula written out.

    Args:
        blocks: every block of the model; all parameters stay trainable.
        policy: bound to these blocks.
        lr, beta1, beta2, eps, weight_decay: AdamW's; tensors of fewer than two dimensions do not decay.

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
        """Take one step from the gradients of all blocks; return the selection."""
        selected = self.policy.propose(self.num_steps)
        norms = block_norms(self.policy.candidates, measure=self.policy.measured())
        if selected is None:
            selected = self.policy.decide(self.num_steps, norms)
        else:
            needed = {*self.policy.observed(self.num_steps)}
            if self.policy.observes_selected(self.num_steps):
                needed |= {*selected}
            norms = {name: norm for name, norm in norms.items() if name in needed}
        for block in self.blocks:
            if block.name in selected:
                for name, weight in zip(block.parameter_names, block.parameters, strict=True):
                    if weight.grad is not None:
                        self._update(name, weight, weight.grad)
        self.policy.commit(self.num_steps, selected, norms)
        self.num_steps += 1
        return selected

    def _update(self, name: str, weight: Tensor, gradient: Tensor) -> None:
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


def top_entries(scores: Sequence[Tensor], count: int) -> set[tuple[int, int]]:
    """Return (tensor, index) of the `count` largest scores by sorting all of them; twin of `StreamingTopK`."""
    ranked = sorted(
        (-score, rank, index)
        for rank, tensor in enumerate(scores)
        for index, score in enumerate(tensor.flatten().tolist())
        if not math.isnan(score)
    )
    return {(rank, index) for _, rank, index in ranked[:count]}


@dataclass
class DenseID3:
    """Twin of `SparseOptimizer` with `ID3` in fp32: dense masks, moments and step counts, and the formula written out.

    Args:
        parameters: by name, in model order, with complete gradients.
        budget, steps, exponent, eps: ID3's.
        lr, beta1, beta2, adam_eps, weight_decay: AdamW's; tensors of fewer than two dimensions do not decay.

    Reference: Agarwal et al., arXiv 2408.14470; Loshchilov, Hutter, arXiv 1711.05101, algorithm 2.
    """

    parameters: Mapping[str, Tensor]
    budget: int
    steps: int
    exponent: float
    eps: float
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    adam_eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        self.masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in self.parameters.items()}
        self.means = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.squares = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.ages = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.num_steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Unmask, then update every unmasked entry."""
        self._unmask()
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            mask, age = self.masks[name], self.ages[name]
            age += mask
            mean = self.beta1 * self.means[name] + (1 - self.beta1) * parameter.grad
            square = self.beta2 * self.squares[name] + (1 - self.beta2) * parameter.grad**2
            self.means[name] = torch.where(mask, mean, self.means[name])
            self.squares[name] = torch.where(mask, square, self.squares[name])
            corrected_mean = self.means[name] / (1 - self.beta1**age)
            corrected_square = self.squares[name] / (1 - self.beta2**age)
            decay = self.lr * self.weight_decay if parameter.ndim >= 2 else 0.0
            moved = parameter * (1 - decay) - self.lr * corrected_mean / (corrected_square.sqrt() + self.adam_eps)
            parameter.copy_(torch.where(mask, moved, parameter))
        self.num_steps += 1

    def _unmask(self) -> None:
        if self.num_steps >= self.steps:
            return
        count = self.budget // self.steps + (self.num_steps < self.budget % self.steps)
        scores = []
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            score = parameter.grad.abs() / (parameter.abs() + self.eps) ** self.exponent
            scores.append(score.masked_fill(self.masks[name], -1.0))
        names = list(self.parameters)
        for rank, index in top_entries(scores, count):
            self.masks[names[rank]].view(-1)[index] = True


def ether_weight(weight: Tensor, normals: Tensor) -> Tensor:
    """Return W H for H = diag(I - 2 u uᵀ / |u|²), built as one dense matrix; twin of `adapters.EtherConfig`.

    Args:
        weight: (outputs, inputs).
        normals: u of each block of inputs.

    Reference: Bini, Roth, Akata, Khoreva, arXiv 2405.20271, equation 1.
    """
    return weight @ torch.block_diag(*(_identity(u) - 2 * _projection(u) for u in normals))


def etherplus_weight(weight: Tensor, *, inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor]) -> Tensor:
    """Return G W H, both dense with blocks I - u uᵀ / |u|² + v vᵀ / |v|²; twin of `adapters.EtherPlusConfig`.

    Args:
        weight: (outputs, inputs).
        inputs: u and v of each block of inputs, for H.
        outputs: those of each block of outputs, for G.

    Reference: Bini, Roth, Akata, Khoreva, arXiv 2405.20271, section 3.3.
    """
    right, left = (
        torch.block_diag(*(_identity(u) - _projection(u) + _projection(v) for u, v in zip(*side, strict=True)))
        for side in (inputs, outputs)
    )
    return left @ weight @ right


def propulsion_weight(
    weight: Tensor, bias: Tensor | None, *, scale: Tensor, degree: int
) -> tuple[Tensor, Tensor | None]:
    """Return diag(z)^k W and diag(z)^k b, multiplied out; twin of `adapters.PropulsionConfig`.

    Reference: Kowsher, Prottasha, Bhat, arXiv 2409.10927, equation 3.
    """
    for _ in range(degree):
        weight = torch.diag(scale) @ weight
        bias = None if bias is None else torch.diag(scale) @ bias
    return weight, bias


def hiwi_bias(bias: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return b + ReLU(b W_down) W_up, unit by unit; twin of `adapters.HiwiConfig`.

    Reference: Liao, Meng, Monz, arXiv 2305.16742.
    """
    new = bias
    for unit in range(down.shape[1]):
        new = new + max(bias.dot(down[:, unit]), bias.new_zeros(())) * up[unit]
    return new


def lorta_update(
    width: Tensor, head: Tensor, rows: Sequence[Tensor], heads: Tensor, *, num_heads: int, heads_on_inputs: bool
) -> Tensor:
    """Return the update (outputs x inputs) of one projection, head by head; twin of `adapters.LortaConfig`.

    Args:
        width: A, (width, rank).
        head: B, (rank, size of a head).
        rows: of C_l for the layer, and of C_m for the matrix.
        heads: C_h, (heads of the model, rank).
        num_heads: heads of this projection, each shared by equally many of the model's.
        heads_on_inputs: True for an output projection.

    Reference: Hounie, Kanatsoulis, Tandon, Ribeiro, arXiv 2410.04060.
    """
    sharing = len(heads) // num_heads
    parts = []
    for own in range(num_heads):
        part = torch.zeros_like(width @ head)
        for other in range(own * sharing, (own + 1) * sharing):
            diagonal = torch.diag(heads[other])
            for row in rows:
                diagonal = diagonal @ torch.diag(row)
            part = part + width @ diagonal @ head / sharing
        parts.append(part)
    update = torch.cat(parts, dim=1)
    return update if heads_on_inputs else update.T


def _identity(vector: Tensor) -> Tensor:
    return torch.eye(len(vector), dtype=vector.dtype, device=vector.device)


def _projection(vector: Tensor) -> Tensor:
    return torch.outer(vector, vector) / vector.dot(vector)


def spt_choice(
    scores: Mapping[str, Tensor], *, costs: Mapping[str, int], shares: Mapping[str, float], budget: int
) -> tuple[set[str], set[tuple[str, int]]]:
    """Return the tensors that train in their form, and the entries of the others; twin of `gradselect.spt.choose`.

    Takes in all entries of one score after the other, the largest first, until more than `budget` entries would train.

    Args:
        scores: by tensor, in model order.
        costs: number of entries that train in the tensor's form; a tensor that has none is left out.
        shares: share of the cost from which the form is taken.
        budget: number of entries to train.
    """
    listed = [
        (score, position, name, index)
        for position, (name, values) in enumerate(scores.items())
        for index, score in enumerate(values.float().reshape(-1).tolist())
        if score > 0
    ]
    listed.sort(key=lambda entry: (-entry[0], entry[1], entry[3]))
    counts, dense = dict.fromkeys(scores, 0), set[str]()
    for value in sorted({entry[0] for entry in listed}, reverse=True):
        more = dict(counts)
        for score, _, name, _ in listed:
            more[name] += score == value
        reached = {name for name in costs if more[name] and more[name] >= round(shares[name] * costs[name], 9)}
        if sum(costs[name] if name in reached else more[name] for name in scores) > budget:
            break
        counts, dense = more, reached
    left = budget - sum(costs[name] for name in dense)
    rest = [(name, index) for _, _, name, index in listed if name not in dense]
    return dense, set(rest[:left])
