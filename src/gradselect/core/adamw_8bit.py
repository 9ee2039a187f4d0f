"""AdamW with 8-bit moments, and its block-wise quantisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .adamw import AdamWRule
from .devices import copy_all
from .rules import AbstractRule, State

BLOCK = 256
"""Numbers that share one scale."""

LEAST = 4096
"""Tensors of fewer entries keep fp32 moments: biases and norms are sensitive, and small."""

PART = {"cpu": 2**22}
PART_ELSEWHERE = 2**24
"""Most entries dequantised at a time, by device, multiples of BLOCK: fp32 moments of an embedding would be too large.
On an accelerator they are more: a part takes dozens of kernels, and launching one takes longer than running it."""

SIGNED = {"exp_avg": True, "exp_avg_sq": False}


@dataclass(frozen=True)
class AdamW8bitRule(AbstractRule):
    """AdamW with moments rounded to 8 bits between steps: 2.03 bytes of state per entry instead of 8.

    Each moment x is flattened and cut into runs of 256 numbers. A run is stored as its scale s (fp32) and, for each
    number, the index (uint8) of the nearest of 256 numbers q of the dynamic map:

        s = max |x|,   c_i = argmin_c |x_i / s - q_c|,   x_i <- s q_(c_i)

    A step dequantises one part of the tensors at a time to fp32 and updates it with `AdamWRule`. Tensors of fewer than
    4096 entries, and those whose number of entries is no multiple of 256, keep fp32 moments.

    The state is plain tensors, so it is counted, moved, saved and read like any other. torchao's AdamW8bit has a tensor
    class of its own and computes the same numbers. The state cannot be sharded: a run would lie on two devices.

    Args:
        fused: see `AdamWRule`.

    Example:
        >>> state = AdamW8bitRule().make_state(torch.zeros(64, 64))
        >>> state["exp_avg"].dtype, state["exp_avg_scale"].numel()
        (torch.uint8, 16)

    Reference:
        Dettmers, Lewis, Shleifer, Zettlemoyer: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861,
        sections 1.3 and 2.1 to 2.2.
    """

    fused: bool | None = False
    state_names = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
    works_on_shards = False

    def make_state(self, weight: Tensor) -> State:
        if not _is_quantised(weight):
            return self._adamw.make_state(weight)
        state = {"step": torch.zeros((), dtype=torch.float32, device=self.counter_device(weight))}
        for name in SIGNED:
            state[name] = torch.zeros_like(weight, dtype=torch.uint8)
            # With a scale of zero every code stands for zero.
            state[_scale(name)] = torch.zeros(weight.numel() // BLOCK, dtype=torch.float32, device=weight.device)
        return state

    def counter_device(self, weight: Tensor) -> torch.device:
        return self._adamw.counter_device(weight)

    def on(self, device: torch.device) -> AdamW8bitRule:
        return replace(self, fused=self._adamw.on(device).fused)

    def update(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]
    ) -> None:
        quantised: list[_Piece] = []
        whole: list[tuple[Tensor, Tensor, State]] = []
        for weight, grad, state in zip(weights, grads, states, strict=True):
            if _scale("exp_avg") in state:
                quantised += _pieces(weight, grad, state)
            else:
                whole.append((weight, grad, state))
        if whole:
            self._adamw.update(*zip(*whole, strict=True), group=group)
        for pieces in _parts(quantised):
            self._update_part(pieces, group)
        for state in states:
            if _scale("exp_avg") in state:
                state["step"] += 1

    def _update_part(self, pieces: Sequence[_Piece], group: Mapping[str, Any]) -> None:
        """Update pieces of tensors; they are quantised and dequantised as one, for runs of 256 keep to a piece."""
        sizes = [piece.size for piece in pieces]
        codes = {name: [piece.of(name) for piece in pieces] for name in SIGNED}
        scales = {name: [piece.scales_of(name) for piece in pieces] for name in SIGNED}
        whole = {
            name: dequantise(_joined(codes[name]), _joined(scales[name]), signed=signed)
            for name, signed in SIGNED.items()
        }
        firsts, seconds = (whole[name].split(sizes) for name in SIGNED)
        targets = [piece.weight for piece in pieces]
        moving = [target.float() for target in targets]
        states = [
            {"step": piece.state["step"].clone(), "exp_avg": first, "exp_avg_sq": second}
            for piece, first, second in zip(pieces, firsts, seconds, strict=True)
        ]
        self._adamw.update(moving, [piece.grad.float() for piece in pieces], states, group)
        for target, moved in zip(targets, moving, strict=True):
            if moved is not target:
                target.copy_(moved)
        for name, signed in SIGNED.items():
            new_codes, new_scales = quantise(whole[name], signed=signed)
            copy_all(codes[name], new_codes.split(sizes))
            copy_all(scales[name], new_scales.split([size // BLOCK for size in sizes]))

    @property
    def _adamw(self) -> AdamWRule:
        return AdamWRule(fused=self.fused)


def quantise(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantise fp32 numbers to 8 bits.

    Args:
        values: shape (n,), n a multiple of 256; not negative unless `signed`.
        signed: selects the dynamic map.

    Returns:
        Codes, uint8, shape (n,), and one scale for each 256 of them, fp32, shape (n / 256,).
    """
    blocks = values.view(-1, BLOCK)  # (16384, 256)
    # The smallest scale keeps a block of zeros from 0 / 0.
    scales = blocks.abs().amax(1).clamp_min(1e-12)
    _, borders = _dynamic_map(signed, values.device)
    return bucketize((blocks / scales[:, None]).view(-1), borders).to(torch.uint8), scales


def dequantise(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return the fp32 numbers that codes and scales stand for. Shape (n,)."""
    numbers, _ = _dynamic_map(signed, codes.device)
    # Indexing with a tensor, numbers[codes], is twenty times slower on a CPU.
    return (numbers.index_select(0, codes.int()).view(-1, BLOCK) * scales[:, None]).view(-1)


def bucketize(values: Tensor, borders: Tensor) -> Tensor:
    """Number of the 255 ascending borders that each value reaches, int32, as `torch.bucketize(..., right=True)`."""
    if values.device.type != "cpu":
        return torch.bucketize(values, borders, right=True, out_int32=True)
    # On a CPU torch's binary search branches at every comparison. This one does not, and takes a fifth of the time.
    found = torch.zeros_like(values, dtype=torch.int32)
    for stride in (128, 64, 32, 16, 8, 4, 2, 1):
        reached = values >= borders.index_select(0, found + (stride - 1))
        found += stride * reached.to(torch.int32)
    return found


@cache
def _dynamic_map(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the 256 numbers that a code can stand for, ascending, and the 255 borders half-way between them.

    Decades k = 0, ..., 6 end at 10^(k - 6). Each has 2^k numbers (2^(k + 1) if unsigned): the middles of equal parts of
    its upper nine tenths. The signed map holds their negatives too. Both maps also hold 0 and 1.
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """Entries of one tensor, flat, from `start` on."""

    weight: Tensor
    grad: Tensor
    state: State
    start: int

    @property
    def size(self) -> int:
        return self.weight.numel()

    def of(self, name: str) -> Tensor:
        return self.state[name].view(-1)[self.start : self.start + self.size]

    def scales_of(self, name: str) -> Tensor:
        return self.state[_scale(name)][self.start // BLOCK : (self.start + self.size) // BLOCK]


def _pieces(weight: Tensor, grad: Tensor, state: State) -> Iterator[_Piece]:
    """Cut a tensor into pieces of at most one part."""
    most = _part_of(weight)
    for number, (part, slope) in enumerate(zip(weight.view(-1).split(most), grad.reshape(-1).split(most), strict=True)):
        yield _Piece(weight=part, grad=slope, state=state, start=number * most)


def _parts(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Gather neighbouring pieces on one device to parts."""
    part: list[_Piece] = []
    for piece in pieces:
        is_full = sum(other.size for other in part) + piece.size > _part_of(piece.weight)
        if part and (is_full or part[0].weight.device != piece.weight.device):
            yield part
            part = []
        part.append(piece)
    if part:
        yield part


def _part_of(tensor: Tensor) -> int:
    return PART.get(tensor.device.type, PART_ELSEWHERE)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _scale(name: str) -> str:
    return f"{name}_scale"
