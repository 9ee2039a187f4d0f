"""AdamW whose moments are kept in 8 bits a number, and the block-wise quantisation behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .adamw import AdamWRule
from .rules import AbstractRule, State

BLOCK = 256
"""Numbers that share one scale."""

LEAST = 4096
"""Tensors of fewer elements keep whole moments: biases and norms are sensitive, and small."""

PART = 2**22
"""Elements whose moments are whole at one time, a multiple of BLOCK: an embedding's would be larger than the rest."""

SIGNED = {"exp_avg": True, "exp_avg_sq": False}


@dataclass(frozen=True)
class AdamW8bitRule(AbstractRule):
    """AdamW on moments that are rounded to 8 bits between steps: 2.03 bytes of state a weight instead of 8.

    Each moment x, flat, is cut into blocks of 256 numbers. A block is kept as its scale s (fp32) and, for each number,
    the index (uint8) of the nearest of 256 numbers q of the dynamic map:

        s = max |x|,   c_i = argmin_c |x_i / s - q_c|,   x_i <- s q_(c_i)

    At a step the moments are whole again for as long as a part of the tensor is updated, in fp32 and by `AdamWRule`.
    Tensors of fewer than 4096 elements, and those whose elements are no multiple of 256, keep whole moments.

    The state is plain tensors, so it is counted, moved, saved and read as any other; torchao's AdamW8bit, which keeps
    a tensor class of its own, computes the same numbers. It cannot be sharded: a block would lie on two devices.

    Args:
        fused: as of `AdamWRule`.

    Example:
        >>> state = AdamW8bitRule().make_state(torch.zeros(64, 64))
        >>> state["exp_avg"].dtype, state["exp_avg_scale"].numel()
        (torch.uint8, 16)

    Reference:
        Dettmers, Lewis, Shleifer, Zettlemoyer: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861,
        sections 1.3 and 2.1 to 2.2.
    """

    fused: bool = False
    state_names = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
    works_on_shards = False

    def make_state(self, weight: Tensor) -> State:
        if not _is_quantised(weight):
            return self._adamw.make_state(weight)
        state = {"step": torch.zeros((), dtype=torch.float32, device=self.counter_device(weight))}
        for name in SIGNED:
            state[name] = torch.zeros_like(weight, dtype=torch.uint8)
            # A scale of zero makes zeros of all codes.
            state[_scale(name)] = torch.zeros(weight.numel() // BLOCK, dtype=torch.float32, device=weight.device)
        return state

    def counter_device(self, weight: Tensor) -> torch.device:
        return self._adamw.counter_device(weight)

    def update(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> None:
        for weight, grad, state in zip(weights, grads, states, strict=True):
            if _scale("exp_avg") in state:
                self._update_quantised(weight, grad, state, group)
            else:
                self._adamw.update([weight], [grad], [state], group)

    def _update_quantised(self, weight: Tensor, grad: Tensor, state: State, group: Mapping[str, Any]) -> None:
        for part in _parts(weight.numel()):
            scales = slice(part.start // BLOCK, part.stop // BLOCK)
            codes = {name: state[name].view(-1)[part] for name in SIGNED}
            whole = {
                name: dequantise(codes[name], state[_scale(name)][scales], signed=signed)
                for name, signed in SIGNED.items()
            }
            target = weight.view(-1)[part]
            moving = target.float()
            moments = {"step": state["step"].clone(), **whole}
            self._adamw.update([moving], [grad.reshape(-1)[part].float()], [moments], group)
            if moving is not target:
                target.copy_(moving)
            for name, signed in SIGNED.items():
                new_codes, new_scales = quantise(whole[name], signed=signed)
                codes[name].copy_(new_codes)
                state[_scale(name)][scales] = new_scales
        state["step"] += 1

    @property
    def _adamw(self) -> AdamWRule:
        return AdamWRule(fused=self.fused)


def quantise(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8) of fp32 numbers, as many as `values`, and the scale of each block of 256.

    Args:
        values: flat, a multiple of 256 of them; not negative unless `signed`.
        signed: which dynamic map.

    Returns:
        codes of shape (n,) and scales of shape (n / 256,).
    """
    blocks = values.view(-1, BLOCK)  # (16384, 256)
    # The smallest scale keeps a block of zeros from 0 / 0.
    scales = blocks.abs().amax(1).clamp_min(1e-12)
    _, borders = _dynamic_map(signed, values.device)
    return num_reached((blocks / scales[:, None]).view(-1), borders).to(torch.uint8), scales


def dequantise(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The fp32 numbers that codes and scales stand for; shape (n,)."""
    numbers, _ = _dynamic_map(signed, codes.device)
    # Plain indexing with a tensor is twenty times as slow on a CPU.
    return (numbers.index_select(0, codes.int()).view(-1, BLOCK) * scales[:, None]).view(-1)


def num_reached(values: Tensor, borders: Tensor) -> Tensor:
    """How many of 255 ascending borders each value reaches, int32: `torch.bucketize(values, borders, right=True)`."""
    if values.device.type != "cpu":
        return torch.bucketize(values, borders, right=True, out_int32=True)
    # On a CPU torch's binary search branches at every comparison; this one does not and takes a fifth of the time.
    found = torch.zeros_like(values, dtype=torch.int32)
    for stride in (128, 64, 32, 16, 8, 4, 2, 1):
        reached = values >= borders.index_select(0, found + (stride - 1))
        found += stride * reached.to(torch.int32)
    return found


@cache
def _dynamic_map(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 numbers that a code can stand for, ascending, and the 255 borders half-way between them.

    Seven decades down from 1. Decade k = 0, ..., 6, which ends at 10^(k - 6), has 2^k numbers (twice as many without a
    sign): the middles of equal parts of its upper nine tenths. With a sign they are there negative too; 0 and 1 beside.
    """
    numbers = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade if signed else decade + 1) + 1, device="cpu", dtype=torch.float32)
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        numbers += [*middles.tolist(), *((-middles).tolist() if signed else ())]
    ascending = torch.tensor(sorted(numbers), device="cpu", dtype=torch.float32)
    borders = (ascending[:-1] + ascending[1:]) / 2
    return ascending.to(device), borders.to(device)


def _is_quantised(weight: Tensor) -> bool:
    return weight.numel() >= LEAST and weight.numel() % BLOCK == 0 and weight.is_contiguous()


def _parts(num_elements: int) -> Iterator[slice]:
    for start in range(0, num_elements, PART):
        yield slice(start, min(start + PART, num_elements))


def _scale(name: str) -> str:
    return f"{name}_scale"
